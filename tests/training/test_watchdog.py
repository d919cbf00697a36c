"""A step that takes far too long: who is late, where, and where the others wait. And nothing said without need."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.errors import ConfigError
from harness.train import main
from harness.training.flags import DEBUG_DEFAULTS, WatchdogConfig
from harness.training.state import TrainState
from harness.training.watchdog import DATA, STEP, Post, Watchdog, advice, describe, late_ranks, limit
from tests.support.faulty_training import Training
from tests.support.launching import DDP, SCRIPT, launcher
from tests.support.parity import assert_equal_weights

NEVER = float("inf")


def post(rank: int, *, phase: str = "data", step: int = 5, count: int = 10, beat: int = 1) -> Post:
    where = {"phase": phase, "step": step, "count": count}
    return Post(rank=rank, host=f"node{rank}", pid=100 + rank, seconds=70.0, beat=beat, **where)


def posts(*found: Post) -> dict[int, Post]:
    return {each.rank: each for each in found}


# Plain data


@pytest.mark.parametrize(
    ("durations", "near_timeout", "expected"),
    [
        ((), 1440.0, 1440.0),  # nothing to compare with
        ((), NEVER, NEVER),
        ((0.1, 0.1, 50.0), 1440.0, 60.0),
        ((20.0, 22.0, 18.0), 1440.0, 200.0),
        ((300.0,), 1440.0, 1440.0),  # ten times the usual would come after the timeout
        ((1000.0,), 1440.0, 2000.0),  # an evaluation is many collectives: it may take longer than one may
        ((0.1,), 24.0, 24.0),
    ],
)
def test_overdue_is_far_beyond_the_usual(durations: tuple[float, ...], near_timeout: float, expected: float) -> None:
    assert limit(durations, slow_seconds=60.0, near_timeout=near_timeout) == expected


def test_the_rank_furthest_behind_is_late() -> None:
    found = posts(post(0, phase=STEP, count=11), post(1, count=10), post(2, phase=STEP, count=11))
    assert late_ranks(found, set()) == [1]
    assert describe(found, set(), num_ranks=3, step=5) == (
        "Step 5 is slow: rank 1 (host node1, pid 101) has been in data (step 5) for 70.0 s; "
        "ranks 0, 2 wait in forward and backward (step 5)."
    )
    assert "py-spy dump --subprocesses --pid 101 on node1" in advice(found, set(), "gloo")


def test_a_silent_rank_is_late_wherever_it_was() -> None:
    found = posts(post(0, phase=STEP), post(1, phase=STEP))
    assert late_ranks(found, {1}) == [1]
    text = describe(found, {1}, num_ranks=2, step=5)
    assert "rank 1 (host node1, pid 101) is silent, last heard of in forward and backward (step 5)" in text
    assert text.endswith("; rank 0 waits in forward and backward (step 5).")
    assert "rank 1 has never been heard of" in describe(posts(post(0)), {1}, num_ranks=2, step=5)


def test_ranks_at_the_same_place_are_all_named_but_not_too_many() -> None:
    found = posts(*(post(rank, phase=STEP) for rank in range(100)))
    text = describe(found, set(), num_ranks=100, step=5)
    assert "rank 3 (host node3, pid 103)" in text
    assert "rank 4" not in text
    assert "and 96 more ranks; all ranks are there" in text


def test_what_can_not_be_asked_is_said() -> None:
    assert "the other ranks can't be asked" in describe(posts(post(1)), set(), num_ranks=2, step=5)


def test_the_hints_are_those_of_the_backend() -> None:
    found = posts(post(0))
    assert "TORCH_FR_DUMP_TEMP_FILE" in advice(found, set(), "nccl")
    assert "TORCH_DISTRIBUTED_DEBUG=DETAIL" in advice(found, set(), "gloo")
    assert advice(found, set(), "") == "See what it does: py-spy dump --subprocesses --pid 100 on node0."


def test_drawing_and_work_are_places_of_their_own() -> None:
    watchdog = Watchdog(WatchdogConfig(), ranks=(0, 1), timeout_seconds=1800)
    state, seen = TrainState(), []
    for item in watchdog.drawn(iter("ab"), state):
        seen.append((item, watchdog._position.phase, watchdog._position.step))
        state.global_step += 1
    assert seen == [("a", STEP, 1), ("b", STEP, 2)]
    assert (watchdog._position.phase, watchdog._position.step) == (DATA, 3)
    assert {phase: len(durations) for phase, durations in watchdog._durations.items()} == {
        "the start": 1,
        DATA: 2,
        STEP: 2,
    }


# One process


class Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the watchdog says meanwhile, whatever a training in this process has made of the log."""
    listener = Listener()
    logging.getLogger("harness.training.watchdog").addHandler(listener)
    yield listener.messages
    logging.getLogger("harness.training.watchdog").removeHandler(listener)


def test_one_process_says_what_takes_so_long_once_and_when_it_is_over(said: list[str]) -> None:
    watchdog = Watchdog(WatchdogConfig(slow_step_seconds=0.5), ranks=(0, 1), timeout_seconds=1800)
    with watchdog.watching():
        watchdog.at(DATA, 1)
        watchdog.at(STEP, 1)
        watchdog.at(DATA, 2)
        time.sleep(5)
        watchdog.at(STEP, 2)
        time.sleep(0.2)
    slow, over = said
    assert slow.startswith("Step 2 is slow: rank 0 (host ")
    assert f"pid {os.getpid()}) has been in data (step 2) for " in slow
    assert " s. Usually data takes " in slow
    assert slow.endswith(f" s. See what it does: py-spy dump --subprocesses --pid {os.getpid()} on {os.uname()[1]}.")
    assert over.startswith("Step 2 goes on after 5.")
    assert over.endswith(" s in data.")


def test_zero_turns_it_off_and_debugging_does(said: list[str]) -> None:
    watchdog = Watchdog(WatchdogConfig(slow_step_seconds=0), ranks=(0, 1), timeout_seconds=1800)
    with watchdog.watching():
        watchdog.at(DATA, 1)
        watchdog.at(DATA, 2)
        time.sleep(2)
    assert not said
    assert DEBUG_DEFAULTS["slow_step_seconds"] == 0


def test_seconds_below_zero_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--slow_step_seconds=-1"):
        WatchdogConfig(slow_step_seconds=-1)
    assert main(["--slow_step_seconds=-1", "--print_config"]) == 2
    assert "--slow_step_seconds=-1.0: use 0 or more." in capsys.readouterr().err


# Two processes

SLOW_SECONDS = 4.0
FAULT_SECONDS = 14.0


def train(folder: Path, *, pace: float = 0.0, task: dict[str, Any] | None = None, **arguments: Any) -> Training:
    return Training(
        folder,
        None,
        pace=pace,
        command=(*launcher(DDP), SCRIPT),
        task=task,
        report_to="none",
        wandb_run_id=None,
        wandb_log_model=None,
        expect_num_processes=2,
        **{"slow_step_seconds": SLOW_SECONDS, "ddp_find_unused_parameters": False, **arguments},
    )


def warnings(training: Training) -> list[str]:
    return [line for line in training.err.splitlines() if "harness.training.watchdog" in line]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return train(tmp_path_factory.mktemp("undisturbed") / "run").ended()


@pytest.mark.slow
def test_an_undisturbed_run_says_nothing(undisturbed: Training) -> None:
    assert warnings(undisturbed) == []


@pytest.mark.slow
def test_a_rank_whose_data_is_slow_is_named_with_the_step(undisturbed: Training, tmp_path: Path) -> None:
    # Sample 41 is the first of the sixth batch of rank 1, which is drawn ahead, with the data of step 5.
    task = {"fault_rank": 1, "sleeps_at": 41, "sleep_seconds": FAULT_SECONDS}
    training = train(tmp_path / "run", task=task).ended()
    slow, over = warnings(training)
    assert ": Step 5 is slow: rank 1 (host " in slow
    assert ") has been in data (step 5) for " in slow
    assert "; rank 0 waits in forward and backward (step 5)." in slow
    assert "py-spy dump --subprocesses --pid " in slow
    assert "TORCH_DISTRIBUTED_DEBUG" in slow
    assert ": Step 5 goes on after 1" in over
    assert over.endswith(" s in forward and backward.")
    assert_equal_weights(undisturbed.output_dir, training.output_dir)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_named_as_silent(undisturbed: Training, tmp_path: Path, rank: int) -> None:
    training = train(tmp_path / "run", pace=0.3)
    training.reach(5)
    (stopped,) = [
        child
        for child in psutil.Process(training.process.pid).children()
        if child.environ().get("RANK") == str(rank)
    ]  # fmt: skip
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(FAULT_SECONDS)
    stopped.send_signal(signal.SIGCONT)
    training.ended()
    slow, over = warnings(training)
    assert f"rank {rank} (host " in slow
    assert f"pid {stopped.pid}) is silent, last heard of in " in slow
    assert f"; rank {1 - rank} waits in " in slow
    step = slow.split(": ")[1].removesuffix(" is slow")
    assert f": {step} goes on after 1" in over
    assert_equal_weights(undisturbed.output_dir, training.output_dir)


@pytest.mark.slow
def test_a_long_evaluation_is_no_stall(tmp_path: Path) -> None:
    task = {"eval_seconds": 2.5 * SLOW_SECONDS}
    training = train(tmp_path / "run", task=task, eval_strategy="epoch").ended()
    assert training.out.count("eval_loss") >= 2
    assert warnings(training) == []
