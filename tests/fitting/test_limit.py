"""A real limit: a process that may not have the memory for the samples of a step at once."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import SCRIPT, run
from tests.support.parity import TRAINING, as_flags, assert_equal_runs

GIVEN: dict[str, Any] = {
    **TRAINING,
    "task": "tests.support.tasks.hungry_task:build",
    "report_to": "none",
    "max_steps": 3,
    "use_cpu": True,
}


def trained(folder: Path, **arguments: Any) -> str:
    ended = run([sys.executable, SCRIPT, *as_flags({**GIVEN, "output_dir": folder, **arguments})])
    assert ended.code == 0, ended.err[-3000:]
    return ended.out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_under_a_limit_of_its_memory_a_process_trains_as_one_without(tmp_path: Path) -> None:
    found = {"per_device_train_batch_size": 24, "auto_find_batch_size": True, "task_args": {"room": 700}}
    said = re.search(r"Micro-batches have (\d+) samples, the most that fit in memory", trained(tmp_path / "a", **found))
    assert said is not None
    size = int(said[1])
    assert 1 <= size < 24
    given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 24 // size}
    trained(tmp_path / "b", **given)
    assert_equal_runs(tmp_path / "b", tmp_path / "a")
