"""The device runs out of memory in mid-training: what is said, what is left, and how the run goes on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint.find import list_checkpoints
from harness.train import main
from tests.gpu.conftest import NeedsCard
from tests.support.parity import TRAINING, as_flags, history, reset, run_harness

TASK = "tests.support.tasks.card_tasks:too_large"
TRAINED = {**TRAINING, "max_steps": 12, "save_strategy": "steps", "save_steps": 4}
FAILS_AT, LAST_SAVED = 7, 4
ROOM = 512 * 2**20  # bytes; the batch that is too large takes more
SMALLER = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def task_args(*, at: int = 0, raises: bool = False) -> dict[str, Any]:
    return {"task_args": {"at": at, "raises": raises, "dropout": 0.0}}


@pytest.fixture
def little_memory(device: str) -> Iterator[None]:
    """Let this process have a little more of the card than it has."""
    if device == "cpu":
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + ROOM) / torch.cuda.get_device_properties(0).total_memory
    )
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def fail(folder: Path, device: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """A training that runs out of memory; returns the line that it ends with."""
    reset()
    capsys.readouterr()
    given = {"task": TASK, "output_dir": folder, "report_to": "none", **arguments}
    assert main([*as_flags(given), f"--use_cpu={device == 'cpu'}"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    reset()
    return shown.splitlines()[-1]


def allocated(device: str) -> int:
    """Bytes of the card that are in use."""
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def check_resumed(folder: Path, whole: Path, device: str, given: dict[str, Any]) -> None:
    """Half the batch, twice: the numbers are those of a run that had the memory, but for the order of sums."""
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{LAST_SAVED}"]
    run_harness(folder, {**TRAINED, **SMALLER, **given, "resume_from_checkpoint": True}, task=TASK, device=device)
    expected, found = ([entry for entry in history(each) if "grad_norm" in entry] for each in (whole, folder))
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for a, b in zip(expected, found, strict=True):
        assert b == pytest.approx(a, rel=1e-4), b["step"]


@pytest.mark.parametrize("raises", [True, False], ids=["raised", "true"])
def test_a_training_that_ran_out_of_memory_goes_on_with_a_smaller_batch(
    raises: bool,
    device: str,
    needs_card: NeedsCard,
    little_memory: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "out"
    run_harness(whole, {**TRAINED, **task_args()}, task=TASK, device=device)
    if not raises:
        needs_card("memory that runs out")
    before = allocated(device)
    last = fail(folder, device, {**TRAINED, **task_args(at=FAILS_AT, raises=raises)}, capsys)
    remedy = "use a smaller --per_device_train_batch_size, --activation_checkpointing, or --bf16"
    assert last.startswith(f"harness train: Out of memory: {remedy}. (CUDA out of memory. Tried to allocate ")
    assert allocated(device) - before < ROOM / 8, "what the training had taken is free again"
    check_resumed(folder, whole, device, task_args(at=FAILS_AT, raises=raises))
