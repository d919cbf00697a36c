"""
The training that is killed: the parity task at a pace, telling the laboratory where it is.

In the folder that the variable HARNESS_FAULTS names: `built` when the task is made, a line in `steps` for each batch
that is drawn (one ahead of the step; of a stream for each step), one in `evaluations` for each evaluation that begins,
and one in `synced` for each file that the process has made durable. From a file `clock` it takes by how much its clock
is set.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import Dataset, IterableDataset

from harness.tasks import AfterStep, Task, TaskConfig, View
from tests.faults.plan import CLOCK_FILE, EVALUATION_SECONDS, FOLDER_VARIABLE, STEP_SECONDS
from tests.support.tasks import parity_task


class Paced(Dataset):  # type: ignore[type-arg]
    """Samples of which every `every`-th takes `seconds` to draw, after a line in the file `told`."""

    def __init__(self, samples: Any, *, told: Path | None, every: int, seconds: float) -> None:
        self.samples, self.told, self.every, self.seconds, self.count = samples, told, every, seconds, 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """What a loader calls, and nobody who only looks at the data: one batch."""
        if self.count % self.every == 0:
            set_clock(Path(os.environ[FOLDER_VARIABLE]) / CLOCK_FILE)
            if self.told is not None:
                tell(self.told, str(time.time()))
            time.sleep(self.seconds)
        self.count += 1
        return [self.samples[index] for index in indices]


def tell(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def tell_what_is_synced(told: Path) -> None:
    """From now on each `os.fsync` of a file is written down: inode, size and time of change at that moment."""
    fsync = os.fsync

    def synced(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        before = os.fstat(number)
        fsync(number)
        tell(told, f"{before.st_ino} {before.st_size} {before.st_mtime_ns}")

    os.fsync = synced


# psutil takes it to say when a process was created.
CLOCK, BOOTED_AT = time.time, psutil._psplatform.boot_time


def set_clock(told: Path) -> None:
    """Let Python's clock, and the boot's time that follows from it, be wrong by the seconds in the file, if any."""
    if told.is_file() and (text := told.read_text(encoding="utf-8")):
        seconds = float(text)
        time.time = lambda: CLOCK() + seconds
        psutil._psplatform.boot_time = lambda: BOOTED_AT() + seconds


def paced(told: Path | None) -> AfterStep:
    """What is done after each step of a stream, whose samples are read long before: it tells, and takes its time."""

    def after_step(_view: View) -> None:
        set_clock(Path(os.environ[FOLDER_VARIABLE]) / CLOCK_FILE)
        if told is not None:
            tell(told, str(time.time()))
        time.sleep(STEP_SECONDS)

    return after_step


def build(config: TaskConfig) -> Task:
    task = parity_task.build(config)
    folder = Path(os.environ[FOLDER_VARIABLE])
    set_clock(folder / CLOCK_FILE)
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        tell_what_is_synced(folder / "synced")
        tell(folder / "built", str(time.time()))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    batches = 1 if config.packing else -(-len(task.eval_dataset) // (8 // world_size * world_size))
    steps = folder / "steps" if is_first else None
    train = {"told": steps, "every": 1, "seconds": STEP_SECONDS}
    evaluation = {"told": folder / "evaluations" if is_first else None, "every": batches, "seconds": EVALUATION_SECONDS}
    task = replace(task, eval_dataset=Paced(task.eval_dataset, **evaluation))
    if isinstance(task.train_dataset, IterableDataset):
        return replace(task, after_step=paced(steps))
    return replace(task, train_dataset=Paced(task.train_dataset, **train))
