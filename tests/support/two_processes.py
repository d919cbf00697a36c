"""One training on two processes, however they are launched, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from harness.tracking.rows.journal import COLUMNS
from tests.support.launching import SCRIPT, Ended, launcher, run
from tests.support.parity import TIMING, TRAINING, as_flags, history

ARGUMENTS: dict[str, Any] = {
    **TRAINING,
    "task": "tests.support.tasks.parity_task:build",
    "task_args": {"random_collator": True},
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 24,
    "max_grad_norm": 0.9,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "save_strategy": "steps",
    "save_steps": 10,
    "expect_num_processes": 2,
}


def trained(config: Path, folder: Path, *, forked: bool = True, **more: Any) -> Ended:
    arguments = {"report_to": "none", "output_dir": folder / "run", **ARGUMENTS, **more}
    return run(
        [*launcher(config), SCRIPT, *as_flags({k: v for k, v in arguments.items() if v is not None})], forked=forked
    )


def finished(config: Path, folder: Path, **more: Any) -> Path:
    ended = trained(config, folder, **more)
    assert ended.code == 0, ended.err[-3000:]
    assert ended.out.count("step 1/") <= 1, "one rank speaks"
    assert "lr_scheduler.step" not in ended.err
    return folder / "run"


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([event["loss"] for event in history(folder) if "loss" in event], dtype=torch.float64)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in COLUMNS and not TIMING.search(name)}
        for line in lines
    ]
