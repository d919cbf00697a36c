"""What is only shown never decides how a command ends: readers that go, full disks, closed streams, encodings."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.training.console import Console
from tests.support.forking import fork
from tests.support.launching import ROOT, SCRIPT, run, torchrun
from tests.support.parity import TASK, as_flags
from tests.support.wandb.file import read_all

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="Linux has it")
TRAINING = {"task": TASK, "use_cpu": True, "max_steps": 6, "logging_steps": 1, "save_strategy": "no"}

PRINTS = """
import contextlib, logging, os, sys, warnings
from harness.signals import prepare_command
prepare_command()
logging.basicConfig()
for number in range(3000):
    print("a line that says nothing \\u2713", number)
    print(number, file=sys.__stderr__)
logging.getLogger().warning("caf\\u00e9")
warnings.warn("it is late")
sys.stdout.flush()
opened = open(sys.argv[1], "w")
assert opened.fileno() > 2, "what is printed would go into it"
with contextlib.suppress(OSError):
    os.write(1, b"from a library")
opened.write("only this")
sys.exit(7)
"""


@contextmanager
def broken_pipe() -> Iterator[int]:
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        yield writing
    finally:
        os.close(writing)


@needs_full
@pytest.mark.parametrize("streams", ["1", "2", "12"])
@pytest.mark.parametrize("what", ["nobody reads", "full", "closed", "ascii"])
@pytest.mark.parametrize("options", [[], ["-u"]], ids=["", "unbuffered"])
def test_no_print_changes_how_a_process_ends(what: str, streams: str, options: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    shell = " ".join(f"{number}>{'&-' if what == 'closed' else FULL}" for number in streams)
    command = [sys.executable, *options, "-c", PRINTS, str(file)]
    with broken_pipe() as pipe:
        given: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if what == "nobody reads":
            given |= {name: pipe for name, number in (("stdout", "1"), ("stderr", "2")) if number in streams}
        elif what != "ascii":
            command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
        env = {**os.environ, "PYTHONPATH": str(ROOT), **({"PYTHONIOENCODING": "ascii"} if what == "ascii" else {})}
        assert subprocess.run(command, env=env, **given, check=False).returncode == 7
    assert file.read_text() == "only this"


def test_what_an_encoding_lacks_is_escaped() -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    code = "from harness.signals import prepare_command; prepare_command(); print('caf\\u00e9')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert done.stdout == b"caf\\xe9\n"


@pytest.mark.parametrize("tracker", ["none", "wandb"])
def test_a_training_whose_output_nobody_reads_trains_to_its_end(tracker: str, tmp_path: Path) -> None:
    flags = as_flags({**TRAINING, "report_to": tracker, "output_dir": tmp_path / "run"})
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    with broken_pipe() as pipe, os.fdopen(os.dup(pipe), "w") as out:
        process = fork([SCRIPT, *flags], env=env, cwd=ROOT, out=out, err=out)
        assert process.wait(120) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    if tracker == "wandb":
        (saved,) = read_all(tmp_path / "run")
        assert (saved.exit_code, len(saved.rows)) == (0, 7)


@pytest.mark.slow
def test_two_ranks_whose_output_nobody_reads_train_to_their_end(tmp_path: Path) -> None:
    flags = as_flags({**TRAINING, "report_to": "none", "output_dir": tmp_path / "run"})
    with broken_pipe() as pipe:
        command = [*torchrun(2), SCRIPT, *flags]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        assert subprocess.run(command, env=env, stdout=pipe, stderr=pipe, cwd=ROOT, check=False).returncode == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_training_in_ascii_ends_well(tmp_path: Path) -> None:
    flags = as_flags({**TRAINING, "report_to": "none", "output_dir": tmp_path / "caf\u00e9"})
    ended = run([sys.executable, SCRIPT, *flags], forked=False, PYTHONIOENCODING="ascii")
    assert ended.code == 0, ended.err[-2000:]
    assert "caf\\xe9" in ended.out


class Fails(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


class Ascii(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")


@pytest.mark.parametrize(
    "stream", [None, Fails(BrokenPipeError(32, "Broken pipe")), Fails(OSError(5, "gone")), Fails(ValueError("closed"))]
)
def test_in_python_too_the_console_ends_nothing(stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    result = harness.run(as_flags({**TRAINING, "report_to": "none", "output_dir": tmp_path / "run"}))
    assert result.state.global_step == 6


def test_the_console_escapes_what_an_encoding_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Ascii()
    monkeypatch.setattr(sys, "stdout", stream)
    Console(enabled=True, progress=False).line("caf\u00e9")
    assert stream.buffer.getvalue() == b"caf\\xe9\n"  # type: ignore[attr-defined]


COMMANDS = [["--help"], ["train", "--help", "all"], ["train", "--print_config", "all"], ["completion", "bash"]]


@pytest.mark.parametrize("argv", [*COMMANDS, ["sync", "nowhere"], ["submit", "--help"]], ids=" ".join)
def test_a_command_whose_output_nobody_reads_shows_no_traceback(argv: list[str]) -> None:
    with broken_pipe() as pipe:
        command = [sys.executable, "-m", "harness", *argv]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == (2 if argv[0] == "sync" else 0)


@needs_full
@pytest.mark.parametrize("argv", COMMANDS[1:], ids=" ".join)
def test_what_was_asked_for_and_could_not_be_written_is_a_failure(argv: list[str]) -> None:
    with FULL.open("w") as full:
        command = [sys.executable, "-m", "harness", *argv]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False)
    assert done.returncode == 1
    says = f"harness {argv[0]}: The output could not be written: [Errno 28] No space left on device.\n"
    assert done.stderr == says
