"""The bar on real terminals (pty), plain lines elsewhere, levels in processes of their own."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import runpy
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from harness.errors import ConfigError
from harness.flags import parse
from harness.training.console import Console, _make_handler
from harness.training.flags import ConsoleConfig

Terminal = Callable[[], Callable[[], str]]
ROOT = Path(__file__).parents[2]
RATES = "122.3 samples/s, 15.7k tokens/s"
LOGS = {"loss": 2.31, "grad_norm": 1.2, "learning_rate": 4.5e-5, "epoch": 0.4}
EVALUATION = {
    "eval_accuracy": 0.8125,
    "eval_loss": 2.25,
    "eval_runtime": 3.2123,
    "eval_samples_per_second": 100.0,
    "eval_steps_per_second": 10.0,
    "epoch": 0.4,
}

LEVELS = """
import json, logging, sys
from harness.training.flags import ConsoleConfig
from harness.training.console import set_up_logging
import datasets, transformers
from huggingface_hub.utils import are_progress_bars_disabled

config, is_main, is_local_main = json.loads(sys.argv[1])
for _ in range(2):
    set_up_logging(ConsoleConfig(**config), is_main=is_main, is_local_main=is_local_main)
log = logging.getLogger("harness.somewhere")
for level in ("debug", "info", "warning", "error"):
    getattr(log, level)(level)
print(json.dumps({
    "transformers": transformers.logging.get_verbosity(),
    "datasets": datasets.logging.get_verbosity(),
    "bars": not are_progress_bars_disabled(),
}))
"""

DEBUGGER = """
from harness.training.console import Console

console = Console(enabled=True, progress=True)
console.start(10, 0)
console.advance(1)
answer = 41
with console.pause():
    breakpoint()
console.advance(2)
console.line("went on")
console.close()
"""

LIBRARIES = """
import logging, sys, warnings
from harness.training.console import Console

class Late(logging.StreamHandler):
    stream = property(lambda self: sys.stderr)
    def __init__(self):
        logging.Handler.__init__(self)

ordinary, late, bare = (logging.getLogger(name) for name in ("a.library", "another", "third"))
ordinary.addHandler(logging.StreamHandler())
late.addHandler(Late())
show = warnings.showwarning
console = Console(enabled=True, progress=True)
console.start(10, 0)
ordinary.warning("it is late")
late.warning("it is over")
bare.warning("it is lost")
warnings.warn("old ways", DeprecationWarning)
console.close()
ordinary.warning("afterwards")
late.warning("as before")
assert warnings.showwarning is show
"""

WANDB = """
import wandb
from harness.tracking.run.terminal import speak_through_log
from harness.training.console import Console, set_up_logging
from harness.training.flags import ConsoleConfig

wandb.termwarn("before")
set_up_logging(ConsoleConfig(), is_main=True, is_local_main=True)
speak_through_log(wandb.Settings(silent=False))
console = Console(enabled=True, progress=True)
console.start(10, 0)
wandb.termlog("Run history:")
wandb.termwarn("Network error")
console.close()
speak_through_log(wandb.Settings(silent=True))
wandb.termwarn("unwanted")
"""


def terminal_of(columns: int, lines: int = 24) -> tuple[int, int]:
    controller, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    return controller, end


def until_closed(controller: int, *commands: str) -> str:
    """What a terminal shows until its other end is closed; each command is typed at a prompt of pdb's."""
    shown, left = b"", list(commands)
    with suppress(OSError):  # Linux says so when the other end is closed
        while piece := os.read(controller, 65536):
            shown += piece
            if shown.rstrip().endswith(b"(Pdb)") and left:
                os.write(controller, left.pop(0).encode())
    os.close(controller)
    return shown.decode()


def on_terminal(code: str, *commands: str) -> str:
    """What Python shows of this code on a terminal."""
    controller, end = terminal_of(columns=100)
    with subprocess.Popen(
        [sys.executable, "-W", "default", "-c", code], stdin=end, stdout=end, stderr=end, cwd=ROOT, close_fds=True
    ) as process:
        os.close(end)
        shown = until_closed(controller, *commands)
    assert process.returncode == 0, shown
    return shown


@pytest.fixture
def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """
    Puts standard output and error on a terminal; gives a function that reads what is new.

    Called in the test itself: between a fixture and its test pytest exchanges both streams.
    """
    controller, end = terminal_of(columns=100)
    with os.fdopen(end, "w", encoding="utf-8") as stream:

        def read() -> str:
            stream.flush()
            shown = b""
            while select.select([controller], [], [], 0.05)[0]:
                shown += os.read(controller, 65536)
            return shown.decode()

        def take_over() -> Callable[[], str]:
            monkeypatch.setattr(sys, "stdout", stream)
            monkeypatch.setattr(sys, "stderr", stream)
            return read

        yield take_over
        monkeypatch.undo()
    os.close(controller)


def lines(shown: str) -> list[str]:
    """What stays on a terminal: text after the last carriage return of each line."""
    return [line.rstrip("\r").rsplit("\r", 1)[-1].strip() for line in shown.split("\n")]


def test_elsewhere_a_report_is_one_readable_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(enabled=True, progress=True)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    console.start(500, 0, "step")
    monkeypatch.setattr(time, "monotonic", lambda: 20.75)
    console.advance(100)
    console.report(LOGS, step=100, rate="812 samples/s")
    monkeypatch.undo()
    console.close()
    numbers = "loss 2.310  grad_norm 1.20  lr 4.5e-05  epoch 0.40"
    assert capsys.readouterr() == (f"step 100/500 (20 %)  {numbers}  812 samples/s  ETA 0:01:23\n", "")


def test_after_a_resume_the_pace_is_that_of_the_new_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(enabled=True, progress=False)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    console.start(1000, 900)
    assert console.eta() == "?"
    monkeypatch.setattr(time, "monotonic", lambda: 50.0)
    console.advance(950)
    assert console.eta() == "0:00:50"


def test_nan_is_shown_as_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(enabled=True, progress=False)
    console.report({"loss": float("nan"), "grad_norm": float("inf")}, step=1, rate=None)
    assert "loss nan  grad_norm inf" in capsys.readouterr().out


def test_numbers_keep_their_digits(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(enabled=True, progress=False)
    console.report({"loss": 0.00012341, "count": 3, "big": 12345.6, "total_flos": 1e18}, step=1, rate=None)
    assert capsys.readouterr().out == "step 1  loss 0.0001234  count 3  big 1.235e+04  ETA ?\n"


def test_an_evaluation_is_one_line_with_the_loss_first_and_the_seconds_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(enabled=True, progress=False)
    console.evaluation(EVALUATION, step=100)
    assert capsys.readouterr().out == "step 100  eval_loss 2.250  eval_accuracy 0.8125  epoch 0.40  3.2 s\n"


def test_the_table_has_two_aligned_columns(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(enabled=True, progress=False)
    console.table([("loss", "2.3"), ("a longer name", "x"), ("empty", "")])
    console.table([])
    assert capsys.readouterr().out == "loss           2.3\na longer name  x\nempty\n"


def test_other_ranks_say_nothing(open_terminal: Terminal) -> None:
    terminal = open_terminal()
    console = Console(enabled=False, progress=True)
    console.start(10, 0)
    console.advance(1)
    console.report(LOGS, step=1, rate="x")
    console.evaluation(EVALUATION, step=1)
    console.line("text")
    console.table([("a", "b")])
    with console.pause():
        pass
    console.close()
    assert terminal() == ""


def test_a_report_stands_above_the_bar_which_shows_rate_and_time_left(open_terminal: Terminal) -> None:
    terminal = open_terminal()
    console = Console(enabled=True, progress=True)
    console.start(500, 90, "step")
    console.advance(100)
    console.report(LOGS, step=100, rate="812 samples/s")
    report, bar = lines(terminal())
    assert report == "step 100/500  loss 2.310  grad_norm 1.20  lr 4.5e-05  epoch 0.40"
    assert re.fullmatch(r"step 100/500  20%\|.*\| ETA \d:\d\d:\d\d, 812 samples/s", bar)
    console.close()


@pytest.mark.parametrize(
    ("columns", "least", "rate"),
    [(40, 2, ""), (80, 20, "122.3 samples/s"), (100, 20, RATES), (120, 40, RATES), (200, 120, RATES)],
)
def test_what_stands_beside_the_bar_gives_way_to_it(
    columns: int, least: int, rate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, end = terminal_of(columns)
    with os.fdopen(end, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        console = Console(enabled=True, progress=True)
        console.start(100_000, 0)
        console.report(LOGS, step=100_000, rate=RATES)
        console.close()
        monkeypatch.undo()
    shown = until_closed(controller)
    report, bar = lines(shown)[-3:-1]
    assert len(report) <= 80
    assert len(bar) <= columns
    found = re.fullmatch(r"step 100000/100000 100%\|(.*)\| ETA [\d:]+(?:, (.*))?", bar)
    assert found is not None
    assert len(found[1]) >= least
    assert (found[2] or "") == rate


def test_a_bar_stands_at_the_last_step_when_it_is_closed(open_terminal: Terminal) -> None:
    terminal = open_terminal()
    console = Console(enabled=True, progress=True)
    console.start(1000, 0)
    for step in range(1, 1001):
        console.advance(step)
    console.close()
    console.close()
    assert "step 1000/1000 100%" in lines(terminal())[-2]


def test_on_a_terminal_an_evaluation_stays_above_the_bar(open_terminal: Terminal) -> None:
    terminal = open_terminal()
    console = Console(enabled=True, progress=True)
    console.start(500, 0)
    console.evaluation(EVALUATION, step=100)
    shown = lines(terminal())
    assert shown[0] == "step 100/500  eval_loss 2.250  eval_accuracy 0.8125  epoch 0.40  3.2 s"
    assert shown[1].startswith("step ")
    assert "|" in shown[1]
    console.close()


def test_no_bar_where_it_is_not_wanted(open_terminal: Terminal) -> None:
    terminal = open_terminal()
    console = Console(enabled=True, progress=False)
    console.start(500, 0)
    console.advance(1)
    assert terminal() == ""
    console.report(LOGS, step=1, rate=None)
    assert terminal().startswith("step 1/500 (0 %)  loss")


@pytest.mark.parametrize(
    ("columns", "rows", "kind"), [(0, 24, "xterm"), (100, 0, "xterm"), (0, 0, "xterm"), (100, 24, "dumb")]
)
def test_a_terminal_without_a_size_or_cursor_gets_lines(
    columns: int, rows: int, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", kind)
    controller, end = terminal_of(columns, rows)
    with os.fdopen(end, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        console = Console(enabled=True, progress=True)
        console.start(500, 0)
        console.report(LOGS, step=1, rate=None)
        monkeypatch.undo()
    os.close(controller)
    assert capsys.readouterr().out.startswith("step 1/500")


def test_a_pause_takes_the_bar_away_and_brings_it_back(open_terminal: Terminal) -> None:
    terminal = open_terminal()
    console = Console(enabled=True, progress=True)
    console.start(500, 0)
    terminal()
    with console.pause():
        assert lines(terminal())[-1] == ""
        console.advance(7)
        console.report(LOGS, step=7, rate=None)
        console.line("a sample")
        _make_handler().handle(logging.makeLogRecord({"msg": "careful", "levelname": "WARNING", "name": "harness.x"}))
        with console.pause():
            print("more")
        shown = lines(terminal())
        assert shown[0].startswith("step 7/500  loss")
        assert shown[1:] == ["a sample", "WARNING harness.x: careful", "more", ""]
    assert "step 7/500" in lines(terminal())[-1]
    console.close()


def test_a_bar_starts_no_thread(open_terminal: Terminal) -> None:
    open_terminal()
    before = threading.active_count()
    console = Console(enabled=True, progress=True)
    console.start(10, 0)
    console.advance(1)
    assert threading.active_count() == before
    console.close()


def test_advance_is_cheap(open_terminal: Terminal) -> None:
    open_terminal()
    console = Console(enabled=True, progress=True)
    console.start(20_000, 0)
    started = time.perf_counter()
    for step in range(1, 20_001):
        console.advance(step)
    seconds = time.perf_counter() - started
    console.close()
    assert seconds / 20_000 < 1e-4


def test_breakpoint_works_inside_a_pause() -> None:
    shown = lines(on_terminal(DEBUGGER, "answer + 1\n", "continue\n"))
    assert "42" in shown
    assert "went on" in shown


def test_a_log_record_does_not_tear_the_bar(open_terminal: Terminal) -> None:
    terminal = open_terminal()
    console = Console(enabled=True, progress=True)
    console.start(10, 0)
    terminal()
    _make_handler().handle(logging.makeLogRecord({"msg": "careful", "levelname": "WARNING", "name": "harness.x"}))
    shown = lines(terminal())
    assert shown[0] == "WARNING harness.x: careful"
    assert "step 0/10" in shown[1]
    console.close()


def test_what_libraries_say_stands_above_the_bar() -> None:
    shown = lines(on_terminal(LIBRARIES))
    assert shown[:3] == ["it is late", "it is over", "it is lost"]
    assert shown[3].endswith("DeprecationWarning: old ways")
    assert re.match(r"step 0/10   0%\|", shown[-4])
    assert shown[-3:] == ["afterwards", "as before", ""]
    assert sum(line.startswith("step 0/10") for line in shown) == 1


def texts(picture: str) -> list[str]:
    found = ElementTree.fromstring(picture).itertext()  # noqa: S314 - our own
    return [text for text in found if text.strip()]


def test_the_picture_shows_what_a_terminal_does() -> None:
    script = runpy.run_path(str(ROOT / ".github" / "terminal.py"))
    sent = "Map:  50%|\rMap: 100%|\r\n\r\nupper\r\x1b[A\x1b[Kblank < 3\x1b[0m\r\n" + "x" * 100 + "y\r\n"
    assert script["render"](sent) == ["Map: 100%|", "blank < 3", "x" * 100, "y", ""]
    assert texts(script["draw"](["a <b>", "", "$ c"])) == ["The quickstart in a terminal", "a <b>", "$ c"]


def test_the_picture_is_small_and_shows_nothing_of_a_machine() -> None:
    picture = (ROOT / ".github" / "terminal.svg").read_text(encoding="utf-8")
    shown = "\n".join(texts(picture))
    assert len(picture.encode()) < 40_000
    assert not re.search(r"/(tmp|root|home|Users)\b", shown)
    assert "eval_loss" in shown
    assert re.search(r"(?m)^folder +runs/\d{8}-\d{6}$", shown)


def test_what_wandb_says_is_a_record_without_colours_above_the_bar() -> None:
    printed, _, rest = on_terminal(WANDB).partition("before")
    assert "\x1b[" in printed  # its own way
    shown = lines(rest)
    assert "\x1b[" not in rest
    assert "WARNING harness.wandb: Network error" in shown
    assert not re.search("Run history|unwanted", rest)


def levels(config: dict[str, Any], is_main: bool, is_local_main: bool) -> tuple[list[str], dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    result = subprocess.run(
        [sys.executable, "-c", LEVELS, json.dumps([config, is_main, is_local_main])],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    said = [line.split(": ")[1] for line in result.stderr.splitlines() if "harness.somewhere: " in line]
    return said, json.loads(result.stdout)


@pytest.mark.parametrize(
    ("config", "ranks", "said", "libraries"),
    [
        ({}, (True, True), ["info", "warning", "error"], 30),
        ({}, (False, False), ["warning", "error"], 30),
        ({"log_level": "debug"}, (False, True), ["debug", "info", "warning", "error"], 10),
        ({"log_level": "debug", "log_on_each_node": False}, (False, True), ["warning", "error"], 30),
    ],
    ids=["main", "replica", "first-of-another-node", "only-one-node-speaks"],
)
def test_levels_follow_the_trainers_rules(
    config: dict[str, Any], ranks: tuple[bool, bool], said: list[str], libraries: int
) -> None:
    shown, others = levels(config, *ranks)
    assert shown == said  # each once, although it was set up twice
    assert (others["transformers"], others["datasets"]) == (libraries, libraries)
    assert others["bars"] == ("info" in said)


def test_a_level_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--log_level=warn is not known.*Did you mean warning"):
        ConsoleConfig(log_level="warn")


@pytest.mark.parametrize(
    ("argv", "shows"),
    [
        ([], True),
        (["--disable_tqdm"], False),
        (["--disable_tqdm", "false"], True),
        (["--log_level", "error"], False),
        (["--log_level", "error", "--disable_tqdm=false"], True),
    ],
)
def test_the_bar_is_switched_as_the_trainers(argv: list[str], shows: bool) -> None:
    assert parse(argv).console.shows_progress is shows
