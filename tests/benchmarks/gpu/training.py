"""Tokens a second, MFU and memory of a bare loop, the Trainer and harness; what a step of a small model costs more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from tests.benchmarks.gpu import models
from tests.benchmarks.gpu.contest import compile_backend, contest
from tests.benchmarks.gpu.models import Work
from tests.benchmarks.gpu.outcomes import Bound, Device, Figures, rounded

Contest = Callable[[Work, Device, Figures], Mapping[str, float]]
MOST_NOISE = 0.01  # beyond it nothing is excused by a restless machine
MOST_MS_MORE = 1.0


def gpt2(device: Device, figures: Figures) -> Sequence[Bound]:
    """GPT-2 from scratch, bf16, compiled."""
    shape, batch = (models.GPT2, 32) if device.on_cuda else ({**models.SMALL_GPT2, "n_layer": 1}, 2)
    figures["compiled by"] = compile_backend(device.type)
    work = Work(models.gpt2(shape), batch=batch, length=shape["n_positions"], device=device.type, compiles=True)
    return fast_enough(fitting(work, device, figures, contest))


def llama(device: Device, figures: Figures) -> Sequence[Bound]:
    """A Llama of 1.1 B parameters, in float32 under bf16's autocast, activations computed again, not compiled."""
    shape, batch = (models.LLAMA, 8) if device.on_cuda else (models.SMALL_LLAMA, 2)
    length = shape["max_position_embeddings"]
    work = Work(models.llama(shape), batch=batch, length=length, device=device.type, recomputes=True)
    return fast_enough(fitting(work, device, figures, contest))


def step(device: Device, figures: Figures) -> Sequence[Bound]:
    """A small model in float32, not compiled."""
    shape = models.SMALL_GPT2
    work = Work(models.gpt2(shape), batch=8, length=shape["n_positions"], device=device.type, bf16=False)
    found, bare = fitting(work, device, figures, contest), float(figures["bare ms"])
    for name in ("Trainer", "ours"):
        figures[f"{name} - bare ms"] = rounded(bare / found[name] - bare)
    return [Bound("ours - bare ms", "<=", MOST_MS_MORE)]


def fitting(work: Work, device: Device, figures: Figures, run: Contest) -> Mapping[str, float]:
    """Run with the largest batch that fits: with half of it where the device is out of memory."""
    while True:
        try:
            return run(work, device, figures)
        except torch.OutOfMemoryError:
            if work.batch == 1:
                raise
        # Here the error is gone, and with it what its frames held.
        figures["out of memory with batch"] = work.batch
        work = work.halved()
        device.free()


def fast_enough(found: Mapping[str, float]) -> Sequence[Bound]:
    # Two loops of equal speed are as often slower than each other as faster.
    slack = round(min(found["noise"], MOST_NOISE), 4)
    return [Bound("ours / bare", ">=", 0.98), Bound("ours / Trainer", ">=", 1.0, slack)]
