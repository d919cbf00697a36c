"""A small network whose memory is limited: it raises torch's error above a number of samples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from harness.tasks import Task, TaskConfig

NUM_SAMPLES, WIDTH = 48, 6
MESSAGE = "CUDA out of memory. Tried to allocate 1.00 GiB.\nMore text."
# What a sample has that takes more memory, though it is no longer than others.
COSTLY = 100.0
FORWARD, BACKWARD = "forward", "backward"


class FailsInBackward(torch.autograd.Function):
    """Passes its input on, and is out of memory when the gradient comes back."""

    @staticmethod
    def forward(_: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()

    @staticmethod
    def backward(_: Any, *__: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(MESSAGE)


class Limited(nn.Module):
    """
    Takes `limit` samples at once, and `costly_limit` if one of them is costly.

    Above it is out of memory in the forward or the backward pass, on one rank alone if `rank` is given. `sizes` are the
    samples of its training passes, `draws` the random number that each drew, `failures` how often memory ran out.
    """

    def __init__(
        self,
        *,
        limit: int = 1000,
        costly_limit: int = 1000,
        where: str = FORWARD,
        rank: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))
        self.unused = nn.Linear(2, 2)
        self.limit, self.costly_limit, self.where = limit, costly_limit, where
        self.is_limited = rank is None or int(os.environ.get("RANK", "0")) == rank
        self.sizes: list[int] = []
        self.draws: list[float] = []
        self.failures = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor | None]:
        if self.training:
            self.sizes.append(len(x))
            self.draws.append(torch.rand(()).item() if self.layers[2].p else 0.0)
        hidden = self.layers(x % COSTLY)
        if self.training:
            most = self.costly_limit if bool((x >= COSTLY).any()) else self.limit
            if self.is_limited and len(x) > most:
                self.failures += 1
                if self.where == FORWARD:
                    raise torch.OutOfMemoryError(MESSAGE)
                hidden = FailsInBackward.apply(hidden)  # type: ignore[no-untyped-call]
        loss = None if labels is None else nn.functional.cross_entropy(hidden, labels)
        return {"loss": loss, "logits": hidden, "activity": hidden.detach().abs().mean()}


class Samples:
    """Points with one of three labels; those of `costly` take more memory."""

    def __init__(self, *costly: int) -> None:
        generator = torch.Generator().manual_seed(3)
        x = torch.rand((NUM_SAMPLES, WIDTH), generator=generator)
        labels = torch.randint(0, 3, (NUM_SAMPLES,), generator=generator)
        x[list(costly)] += COSTLY
        self.samples = [{"x": each, "labels": label} for each, label in zip(x, labels, strict=True)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:
        return self.samples[index]


def collate(samples: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([each[name] for each in samples]) for name in ("x", "labels")}


def build(config: TaskConfig) -> Task:
    """The arguments of Limited, and the samples that are costly, from task_args."""
    options = dict(config.task_args or {})
    costly = options.pop("costly", [])
    return Task(
        model=Limited(**options),
        train_dataset=Samples(*costly),
        data_collator=collate,
        logged_outputs=("activity",),
    )
