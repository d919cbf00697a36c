"""
Make `terminal.svg`, the picture of the quickstart in the README.

`python .github/terminal.py` trains some steps on a terminal of 100 columns, in a temporary folder, and draws what it
shows at the end. `python .github/terminal.py -` draws what `script` has recorded at that width, from standard input.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import tempfile
import termios
from contextlib import suppress
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Path(__file__).with_suffix(".svg")
FLAGS = ("--max_steps=60", "--logging_steps=10", "--eval_steps=30", "--save_steps=30")
TYPED = " ".join(("harness", "train", *FLAGS))
COLUMNS, ROWS = 100, 40
MOST_BYTES = 40_000

CHARACTER, LINE, MARGIN = 8.0, 18, 16  # pixels
BACKGROUND, PLAIN, FAINT, GREEN, BLUE = "#0d1117", "#d1d7e0", "#8b949e", "#7ee787", "#79c0ff"
# A control sequence, a character that moves the cursor, or a run of text.
PIECES = re.compile(r"\x1b\[([\d;?]*)([@-~])|\x1b.|([\r\n\b])|([^\x00-\x1f\x7f]+)|.", re.DOTALL)


def record() -> str:
    """Train on a terminal; returns all that it was sent. Nothing of this machine or its user gets into it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV") if name in os.environ
        }
        environment |= {"HOME": folder, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "LANG": "C.UTF-8"}
        controller, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        command = [sys.executable, "-m", "harness", "train", *FLAGS]
        with subprocess.Popen(command, stdin=end, stdout=end, stderr=end, cwd=folder, env=environment) as process:  # noqa: S603
            os.close(end)
            shown = b""
            with suppress(OSError):  # Linux says so when the other end is closed
                while piece := os.read(controller, 65536):
                    shown += piece
        os.close(controller)
        text = shown.decode(errors="replace")
        if process.returncode != 0:
            raise SystemExit(f"{TYPED} ended with {process.returncode}:\n{text}")
        for secret in (folder, str(ROOT), sys.prefix, str(Path.home()), socket.gethostname()):
            if len(secret) > 1 and secret in text:
                raise SystemExit(f"The picture would show {secret}, which is this machine's.")
        return text


def render(sent: str, columns: int = COLUMNS) -> list[str]:
    """The lines that a terminal shows which was sent this, those that have scrolled away too."""
    screen: list[list[str]] = [[]]
    row = column = 0
    for match in PIECES.finditer(sent):
        parameters, control, move, text = match.groups()
        if control == "A":
            row = max(0, row - int(parameters or 1))
        elif control == "K":
            del screen[row][column:]
        elif move == "\n":
            row += 1
        elif move is not None:
            column = 0 if move == "\r" else max(0, column - 1)
        for letter in text or "":
            if column == columns:
                row, column = row + 1, 0
            screen += [[] for _ in range(row + 1 - len(screen))]
            line = screen[row]
            line += " " * (column + 1 - len(line))
            line[column] = letter
            column += 1
        screen += [[] for _ in range(row + 1 - len(screen))]
    return ["".join(line).rstrip() for line in screen]


def draw(lines: list[str]) -> str:
    """The lines as an SVG, each as wide as its letters are many, whatever font the reader has."""
    size = (round(2 * MARGIN + COLUMNS * CHARACTER), 2 * MARGIN + LINE * len(lines))
    drawn = []
    for number, line in enumerate(lines, start=1):
        if line:
            place = f'x="{MARGIN}" y="{MARGIN + LINE * number - 5}"'
            extent = f'textLength="{len(line) * CHARACTER:g}" lengthAdjust="spacingAndGlyphs"'
            drawn.append(f'<text {place} {extent} fill="{colour(line)}">{escape(line, quote=False)}</text>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}">',
            "<title>The quickstart in a terminal</title>",
            f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>',
            '<g font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="13"'
            ' style="white-space: pre" xml:space="preserve">',
            *drawn,
            "</g>",
            "</svg>\n",
        ]
    )


def colour(line: str) -> str:
    """What is typed, the bar, evaluations, and the rest."""
    if line.startswith("$ "):
        return GREEN
    if "%|" in line:
        return BLUE if line.startswith("step ") else FAINT
    return GREEN if re.match(r"step .*eval_", line) else PLAIN


def main() -> None:
    """Draw the picture."""
    is_recorded = sys.argv[1:] == ["-"]
    lines = render(sys.stdin.buffer.read().decode(errors="replace") if is_recorded else record())
    lines = [line for line in lines if not line.startswith(("Script started on ", "Script done on "))]
    while lines and not lines[-1]:
        lines.pop()
    picture = draw(lines if is_recorded else [f"$ {TYPED}", *lines])
    if len(picture.encode()) > MOST_BYTES:
        raise SystemExit(f"The picture has {len(picture.encode())} bytes, more than {MOST_BYTES}.")
    PICTURE.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
