"""A real limit: a process that may not have the memory for the samples of a step at once."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import SCRIPT, run
from tests.support.parity import TRAINING, as_flags, history

GIVEN: dict[str, Any] = {
    **TRAINING,
    "task": "tests.support.fitting.hungry_task:build",
    "report_to": "none",
    "max_steps": 2,
    "use_cpu": True,
}


def trained(folder: Path, **arguments: Any) -> str:
    ended = run([sys.executable, SCRIPT, *as_flags({**GIVEN, "output_dir": folder, **arguments})])
    assert ended.code == 0, ended.err[-3000:]
    return ended.out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_under_a_limit_of_its_memory_a_process_trains_as_one_without(tmp_path: Path) -> None:
    finds = {"per_device_train_batch_size": 16, "auto_find_batch_size": True, "task_args": {"room": 500}}
    said = re.search(r"Micro-batches have (\d+) samples, the most that fit in memory", trained(tmp_path / "a", **finds))
    assert said is not None
    size = int(said[1])
    assert 1 <= size < 16
    given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size}
    trained(tmp_path / "b", **given)
    expected, found = (history(tmp_path / name)[:-1] for name in ("b", "a"))
    assert [event["step"] for event in found] == [1, 2]
    for one, other in zip(expected, found, strict=True):
        assert other == pytest.approx(one, rel=1e-5), one["step"]
