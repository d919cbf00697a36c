"""How long a save holds a training up: `torch.save`, the Trainer, torch's `async_save`, harness, 124 M parameters."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from tests.benchmarks.gpu import models
from tests.benchmarks.gpu.contest import Bare, alone
from tests.benchmarks.gpu.models import Work, stacked
from tests.benchmarks.gpu.outcomes import Bound, Device, Figures, rounded
from tests.benchmarks.save import KEPT, STEPS_BESIDE, with_harness, with_trainer

MOST_OF_TRAINER = 0.1
MIN_ROUNDS, MAX_ROUNDS = 2, 6
# Returns what waits until the save is on the disk.
Way = Callable[[], Callable[[], object]]


def save(device: Device, figures: Figures) -> Sequence[Bound]:
    """The time until the device has nothing left to do for a save and the training's thread can go on."""
    shape = models.GPT2 if device.on_cuda else models.SMALL_GPT2
    work = Work(models.gpt2(shape), batch=1, length=64, device=device.type, bf16=False)
    where = {} if device.on_cuda else {"use_cpu": True}
    with alone(device) as scratch, models.offered(work, stacked):
        folder = Path(scratch)
        bare = Bare(work, device)
        bare.step()
        trainers = with_trainer(folder / "trainer", models.build(), where)
        run, saves, steps = with_harness(folder / "ours", models.TASK, where)

        def ours() -> Callable[[], object]:
            saves()
            return run.checkpoints.settle

        ways: dict[str, Way] = {
            "torch.save": plainly(folder, bare),
            "Trainer": lambda: trainers() or nothing,
            "async_save": by_dcp(folder / "dcp", bare),
            # DefaultStager of torch 2.11 can't be used twice. Kept buffers are pinned, which takes a card.
            "async_save, kept buffers": by_dcp(
                folder / "dcp-kept", bare, async_stager=BlockingAsyncStager(cache_staged_state_dict=device.on_cuda)
            ),
            "ours": ours,
        }
        take_turns(ways, steps, device, figures)
        figures["ours says"] = run.checkpoints.describe()
    figures["ours / Trainer"] = rounded(float(figures["ours s"]) / float(figures["Trainer s"]))
    return [Bound("ours / Trainer", "<=", MOST_OF_TRAINER)]


def take_turns(ways: dict[str, Way], steps: Callable[[], None], device: Device, figures: Figures) -> None:
    """Save in turns, each with a quiet disk, until the seconds are over; the first save of each allocates."""
    began = time.perf_counter()
    held: dict[str, list[float]] = {name: [] for name in ways}
    on_disk: dict[str, list[float]] = {name: [] for name in ways}
    alone_ms, beside_ms = [], []

    def timed_steps() -> float:
        begin = device.wait()
        for _ in range(STEPS_BESIDE):
            steps()
        return 1000 * (device.wait() - begin) / STEPS_BESIDE

    for i in range(MAX_ROUNDS + 1):
        for name, way in ways.items():
            begin = device.wait()
            settle = way()
            held[name].append(device.wait() - begin)
            if name == "ours":
                beside_ms.append(timed_steps())
            settle()
            on_disk[name].append(time.perf_counter() - begin)
            if name == "ours":
                alone_ms.append(timed_steps())
        for name, seconds in held.items():
            figures[f"{name} first s"] = rounded(seconds[0])
            figures[f"{name} s"] = rounded(statistics.median(seconds[1:] or seconds))
            figures[f"{name} on disk s"] = rounded(statistics.median(on_disk[name]))
        figures["rounds"] = i
        if i >= MIN_ROUNDS and time.perf_counter() - began > device.seconds:
            break
    figures["a step of ours ms"] = rounded(statistics.median(alone_ms))
    figures["beside its writer ms"] = rounded(statistics.median(beside_ms))


def nothing() -> None:
    pass


def state_of(bare: Bare) -> dict[str, Any]:
    return {"model": bare.model.state_dict(), "optimizer": bare.optimizer.state_dict()}


def plainly(folder: Path, bare: Bare) -> Way:
    number = count()

    def way() -> Callable[[], object]:
        torch.save(state_of(bare), folder / f"{next(number) % KEPT}.pt")
        return nothing

    return way


def by_dcp(folder: Path, bare: Bare, **options: Any) -> Way:
    number = count()

    def way() -> Callable[[], object]:
        i = next(number)
        shutil.rmtree(folder / str(i - KEPT), ignore_errors=True)
        saving: Future[Any] = checkpoint.async_save(state_of(bare), checkpoint_id=str(folder / str(i)), **options)
        return saving.result

    return way
