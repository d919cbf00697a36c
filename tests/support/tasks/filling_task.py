"""The parity task, but from one sample to another something else has filled the disk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from harness.tasks import Task, TaskConfig
from tests.support.tasks import parity_task


class FillsDisk(Dataset):  # type: ignore[type-arg]
    def __init__(self, samples: Any, *, ballast: Path, from_sample: int, to_sample: int) -> None:
        self.samples, self.ballast = samples, ballast
        self.from_sample, self.to_sample = from_sample, to_sample
        self.count = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.count += 1
        if self.count == self.to_sample:
            self.ballast.unlink()
        elif self.from_sample <= self.count < self.to_sample:
            fill(self.ballast)
        return self.samples[index]


def fill(ballast: Path) -> None:
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while os.write(descriptor, b"0" * 4096):
            pass
    except OSError:  # it is full
        pass
    finally:
        os.close(descriptor)


def build(config: TaskConfig) -> Task:
    options = dict(config.task_args or {})
    task = parity_task.build(replace(config, task_args=None))
    places = {"from_sample": options["from_sample"], "to_sample": options["to_sample"]}
    return replace(task, train_dataset=FillsDisk(task.train_dataset, ballast=Path(options["fill"]), **places))
