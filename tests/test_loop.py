"""The loop itself: what a step costs and what it leaves out."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.parity import TRAINING, run_harness


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is read by the host: each would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            # Transformers looks whether a padding mask masks anything: the model's affair, not the loop's.
            self.count += not any("masking_utils" in frame.filename for frame in traceback.extract_stack())
        return function(*args, **(kwargs or {}))


def reads(folder: Path, **arguments: Any) -> int:
    # Fused, as the plain one reads its count of steps, which is on the CPU.
    quiet = {
        "optim": "adamw_torch_fused",
        "logging_steps": 1000,
        "lr_scheduler_type": "constant",
        "include_num_input_tokens_seen": "all",
    }
    with CountReads() as mode:
        run_harness(folder, {**TRAINING, **quiet, **arguments})
    return mode.count


def test_a_step_that_does_not_report_never_waits_for_the_device(tmp_path: Path) -> None:
    few = reads(tmp_path / "few", max_steps=5)
    many = reads(tmp_path / "many", max_steps=14)  # in the same epoch: each begins with a random number
    assert few == many
    assert reads(tmp_path / "reporting", max_steps=5, logging_steps=1) > few, "nothing was counted"


def test_another_number_of_threads_is_told_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = {**TRAINING, "save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    run_harness(tmp_path / "run", arguments)
    manifest = tmp_path / "run" / "checkpoint-5" / "harness_state.json"
    content = json.loads(manifest.read_text())
    assert content["software"]["num_threads"] == torch.get_num_threads()
    content["software"]["num_threads"] = 64
    del content["sha256"]  # of the manifest itself; one of a version before has none
    manifest.write_text(json.dumps(content))
    logger = logging.getLogger("harness.snapshot")
    logger.addHandler(caplog.handler)
    try:
        run_harness(tmp_path / "on", {**arguments, "resume_from_checkpoint": tmp_path / "run" / "checkpoint-5"})
    finally:
        logger.removeHandler(caplog.handler)
    assert "num_threads 64 (now 1)" in caplog.text
