"""The bar on real terminals (pty), plain lines elsewhere, levels in processes of their own."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.errors import ConfigError
from harness.flags import parse
from harness.training.console import Console, _make_handler
from harness.training.flags import ConsoleConfig

Terminal = Callable[[], Callable[[], str]]
ROOT = Path(__file__).parents[2]
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


def terminal_of(columns: int, lines: int = 24) -> tuple[int, int]:
    controller, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    return controller, end


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


def test_the_bar_shows_loss_rate_and_time_left(open_terminal: Terminal) -> None:
    terminal = open_terminal()
    console = Console(enabled=True, progress=True)
    console.start(500, 90, "step")
    console.advance(100)
    console.report(LOGS, step=100, rate="812 samples/s")
    shown = lines(terminal())
    assert len(shown) == 1
    assert re.search(r"step 100/500  20%\|.*\| ETA \d:\d\d:\d\d, loss 2.310, lr 4.5e-05, 812 samples/s", shown[0])
    console.close()


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


@pytest.mark.parametrize(("columns", "rows"), [(0, 24), (100, 0), (0, 0)])
def test_a_terminal_without_a_size_gets_lines(
    columns: int, rows: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
        with console.pause():
            print("more")
        assert lines(terminal()) == ["a sample", "more", ""]
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
    controller, end = terminal_of(columns=100)
    with subprocess.Popen(
        [sys.executable, "-c", DEBUGGER], stdin=end, stdout=end, stderr=end, cwd=ROOT, close_fds=True
    ) as process:
        os.close(end)
        shown, commands = b"", [b"answer + 1\n", b"continue\n"]
        while True:
            try:
                piece = os.read(controller, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
            if not piece:
                break
            shown += piece
            if shown.rstrip().endswith(b"(Pdb)") and commands:
                os.write(controller, commands.pop(0))
    os.close(controller)
    assert process.returncode == 0
    assert "42" in lines(shown.decode())
    assert "went on" in lines(shown.decode())


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
