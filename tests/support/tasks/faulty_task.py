"""The parity task at a pace: each step writes down when it began, and takes a given time at least."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from harness.tasks import Task, TaskConfig
from tests.support.tasks import parity_task


class Paced(Dataset):  # type: ignore[type-arg]
    """
    Samples, the first of each batch after `seconds` of sleep; `times` gets a line for it, on the monotonic clock.

    With `raises_at` that sample, counted from 1, can't be read. With `sleeps_at` it takes `sleep_seconds`. With
    `exits_at` its process ends there, without a word.
    """

    def __init__(
        self,
        samples: Any,
        *,
        times: Path,
        seconds: float,
        batch: int,
        raises_at: int,
        sleeps_at: int,
        sleep_seconds: float,
        exits_at: int = 0,
    ) -> None:
        self.samples, self.times, self.seconds, self.batch, self.raises_at = samples, times, seconds, batch, raises_at
        self.sleeps_at, self.sleep_seconds, self.exits_at = sleeps_at, sleep_seconds, exits_at
        self.count = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """What a loader calls, and nobody who only looks at the data."""
        return [self._counted(index) for index in indices]

    def _counted(self, index: int) -> dict[str, torch.Tensor]:
        if self.count % self.batch == 0:
            write_time(self.times)
            time.sleep(self.seconds)
        self.count += 1
        if self.count == self.raises_at:
            raise RuntimeError(f"sample {self.count} can't be read")
        if self.count == self.exits_at:
            os._exit(3)
        if self.count == self.sleeps_at:
            time.sleep(self.sleep_seconds)
        return self.samples[index]


def write_time(path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{time.monotonic()}\n")


class SlowToRead(Dataset):  # type: ignore[type-arg]
    """Samples, the first of each pass after `seconds` of sleep."""

    def __init__(self, samples: Any, *, seconds: float) -> None:
        self.samples, self.seconds = samples, seconds

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 0:
            time.sleep(self.seconds)
        return self.samples[index]


class SlowToSave:
    """In place of a tokenizer: after the rehearsal and `quick` saves each takes `seconds` more, and is written down."""

    def __init__(self, seconds: float, *, quick: int, saves: Path) -> None:
        self.seconds, self.quick, self.saves = seconds, quick, saves
        self.count = -1

    def save_pretrained(self, folder: Any) -> None:
        self.count += 1
        if self.count > self.quick:
            write_time(self.saves)
            time.sleep(self.seconds)


FAULTS = {"raises_at": 0, "sleeps_at": 0, "sleep_seconds": 0.0, "exits_at": 0}


def build(config: TaskConfig) -> Task:
    """`fault_rank` is the rank that the faults happen on; without it they happen on all."""
    given = {"seconds": 0.0, "batch": 8, "eval_seconds": 0.0, "save_seconds": 0.0, "quick_saves": 0}
    given |= {**FAULTS, **(config.task_args or {})}
    rank = given.pop("fault_rank", None)
    if rank is not None and os.environ.get("RANK", "0") != str(rank):
        given |= FAULTS
    task = parity_task.build(replace(config, task_args=None))
    if (seconds := given.pop("eval_seconds")) > 0:
        task = replace(task, eval_dataset=SlowToRead(task.eval_dataset, seconds=seconds))
    times = Path(given.pop("times"))
    quick = given.pop("quick_saves")
    if (seconds := given.pop("save_seconds")) > 0:
        task = replace(task, processing_class=SlowToSave(seconds, quick=quick, saves=times.with_name("saves")))
    write_time(times.with_name("built"))
    if os.environ.get("RANK", "0") != "0":
        times = times.with_name(f"{times.name}-{os.environ['RANK']}")
    return replace(task, train_dataset=Paced(task.train_dataset, times=times, **given))
