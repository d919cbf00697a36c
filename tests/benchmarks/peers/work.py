"""What all loops train: a GPT-2 with random weights on random tokens; its collator notes when a batch is made."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from harness.tasks import Task, TaskConfig

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]
LEARNING_RATE, MAX_GRAD_NORM, SEED = 1e-3, 1.0, 42
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 256, "n_positions": 32}
LARGE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1024, "n_positions": 128}


@dataclass
class Work:
    """A model's shape, samples for so many steps, and the times at which a loop has asked for a batch."""

    shape: Mapping[str, int]
    _: KW_ONLY
    steps: int
    warmup: int = 5  # memory that the loop before has given back is taken again
    batch: int = 8
    logging_steps: int = 1000
    is_tracked: bool = False
    calls: list[float] = field(default_factory=list)

    def model(self) -> GPT2LMHeadModel:
        return GPT2LMHeadModel(GPT2Config(**self.shape, bos_token_id=0, eos_token_id=0))

    @property
    def tokens(self) -> torch.Tensor:
        """Random ones, the same in each call: samples x positions."""
        size = (self.batch * self.steps, self.shape["n_positions"])
        return torch.randint(0, self.shape["vocab_size"], size, generator=torch.Generator().manual_seed(1))

    @property
    def samples(self) -> Samples:
        return Samples(self.tokens)

    def noting(self, collate: Collate) -> Collate:
        """A collator that notes when it is called."""

        def noted(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
            self.calls.append(time.perf_counter())
            return collate(samples)

        return noted

    @property
    def collator(self) -> Collate:
        """What stacks samples, and notes it."""
        return self.noting(self._stacked)

    def _stacked(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")}

    def milliseconds(self) -> float:
        """The middle step, from one batch to the next, without the first ones."""
        times = self.calls[self.warmup :]
        return statistics.median(1000 * (b - a) for a, b in pairwise(times))

    @property
    def setting(self) -> str:
        layers, width = self.shape["n_layer"], self.shape["n_embd"]
        size = f"GPT-2 of {layers} x {width}, {self.batch} x {self.shape['n_positions']} tokens"
        return f"{size}, {self.steps} steps, threads: {torch.get_num_threads()}"


class Samples(Dataset):  # type: ignore[type-arg]
    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


_given: list[Work] = []
TASK = f"{__name__}:build"


def build(config: TaskConfig | None = None) -> Task:
    """The task for harness, which finds it by its name."""
    (work,) = _given
    return Task(model=work.model(), train_dataset=work.samples, data_collator=work.collator)


@contextmanager
def offered(work: Work) -> Iterator[None]:
    """Make `build` build this."""
    _given[:] = [work]
    try:
        yield
    finally:
        _given.clear()
