"""The parity task, but the process gets a signal while it trains: once, at a given sample, on a given rank."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from harness.tasks import Task, TaskConfig
from tests.support.tasks import parity_task


class Signals(Dataset):  # type: ignore[type-arg]
    def __init__(self, samples: Any, *, after: int, sent: Path, number: signal.Signals) -> None:
        self.samples, self.after, self.sent, self.number = samples, after, sent, number
        self.count = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """What a loader calls, and nobody who only looks at the data."""
        return [self._counted(index) for index in indices]

    def _counted(self, index: int) -> dict[str, torch.Tensor]:
        self.count += 1
        if self.count == self.after and not self.sent.exists():
            self.sent.touch()
            os.kill(os.getpid(), self.number)
        return self.samples[index]


def build(config: TaskConfig) -> Task:
    """`signal` is SIGTERM unless it is given."""
    options = {"rank": 0, "signal": "SIGTERM", **(config.task_args or {})}
    task = parity_task.build(replace(config, task_args=None))
    if int(os.environ.get("RANK", "0")) != options["rank"]:
        return task
    number = signal.Signals[options["signal"]]
    data = Signals(task.train_dataset, after=options["after"], sent=Path(options["sent"]), number=number)
    return replace(task, train_dataset=data)
