"""Two processes, one of which runs out of memory: both make the step again, and nobody waits for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.fitting.limited_task import BACKWARD, FORWARD
from tests.support.launching import DDP, FSDP2, SCRIPT, Ended, launcher, needs_fsdp, run
from tests.support.parity import TRAINING, as_flags, assert_equal_runs, history

pytestmark = pytest.mark.slow
SHORT: dict[str, Any] = {
    **TRAINING,
    "task": "tests.support.fitting.limited_task:build",
    "report_to": "none",
    "train_sampling_strategy": "sequential",
    "max_steps": 5,
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 2,
    "expect_num_processes": 2,
}
# In the last micro-batch of the second step, on the second rank: each step has 24 of the 48 samples, in their order.
COSTLY = [45]


def trained(config: Path, folder: Path, *, finds: bool = True, **task_args: Any) -> Ended:
    given = {**SHORT, "auto_find_batch_size": finds, "output_dir": folder, "task_args": {"costly": COSTLY, **task_args}}
    return run([*launcher(config), SCRIPT, *as_flags(given)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training as DDP makes it, with the memory that it takes."""
    folder = tmp_path_factory.mktemp("whole")
    ended = trained(DDP, folder, finds=False, limit=6)
    assert ended.code == 0, ended.err[-3000:]
    return folder


def test_the_smallest_of_what_fits_on_the_ranks_is_taken_and_gradients_are_those_of_ddp(
    whole: Path, tmp_path: Path
) -> None:
    ended = trained(DDP, tmp_path, limit=6, rank=1)
    assert ended.code == 0, ended.err[-3000:]
    assert ended.out.count("Micro-batches have 6 samples, the most that fit in memory; a device takes 2") == 1
    assert "Out of memory" not in ended.out
    assert_equal_runs(whole, tmp_path)


@pytest.mark.parametrize("where", [FORWARD, BACKWARD])
def test_a_rank_that_is_out_of_memory_does_not_leave_the_other_waiting(where: str, whole: Path, tmp_path: Path) -> None:
    ended = trained(DDP, tmp_path, limit=6, costly_limit=3, rank=1, where=where)
    assert ended.code == 0, ended.err[-3000:]
    assert ended.out.count("Out of memory in step 2: micro-batches are split into parts of at most 3 samples") == 1
    expected, found = ([event for event in history(each) if "loss" in event] for each in (whole, tmp_path))
    assert [event["step"] for event in found] == [1, 2, 3, 4, 5]
    for one, other in zip(expected, found, strict=True):
        assert other == pytest.approx(one, rel=1e-5), one["step"]


def test_a_rank_that_can_not_go_on_ends_both(tmp_path: Path) -> None:
    ended = trained(DDP, tmp_path, limit=6, costly_limit=0, rank=1)
    assert ended.code != 0
    assert "harness train: Out of memory on another rank: use a smaller --per_device_train_batch_size" in ended.err


@needs_fsdp
def test_shards_are_refused(tmp_path: Path) -> None:
    ended = trained(FSDP2, tmp_path)
    assert ended.code != 0
    assert "--auto_find_batch_size is not supported with FSDP2: a rank that runs out of memory" in ended.err
