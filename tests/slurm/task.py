"""The parity task, slowed in a job's first attempt, at full speed otherwise; it can also raise."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from harness.tasks import Task, TaskConfig
from tests.faults.plan import FOLDER_VARIABLE
from tests.support.tasks import parity_task

PACE_VARIABLE = "HARNESS_TEST_PACE"


class Paced(Dataset):  # type: ignore[type-arg]
    """Samples of which each batch takes its time, and is told by rank zero: a line with the attempt's number."""

    def __init__(self, samples: Any, *, seconds: float, told: Path | None, attempt: str, fails_at: int | None) -> None:
        self.samples, self.seconds, self.told, self.attempt, self.fails_at = samples, seconds, told, attempt, fails_at
        self.count = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """What a loader calls, and nobody who only looks at the data: one batch."""
        self.count += 1
        if self.count == self.fails_at:
            raise ZeroDivisionError("as the test wants it")
        if self.told is not None:
            with self.told.open("a", encoding="utf-8") as file:
                file.write(f"{self.attempt}\n")
        time.sleep(self.seconds)
        return [self.samples[index] for index in indices]


def build(config: TaskConfig) -> Task:
    options = dict(config.task_args or {})
    fails_at = options.pop("fails_at", None)
    task = parity_task.build(replace(config, task_args=options))
    attempt = os.environ.get("SLURM_RESTART_COUNT") or "0"
    folder = os.environ.get(FOLDER_VARIABLE)
    is_first = os.environ.get("RANK", "0") == "0"
    data = Paced(
        task.train_dataset,
        seconds=float(os.environ.get(PACE_VARIABLE, "0")) if attempt == "0" else 0.0,
        told=Path(folder) / "steps" if folder and is_first else None,
        attempt=attempt,
        fails_at=fails_at,
    )
    return replace(task, train_dataset=data)
