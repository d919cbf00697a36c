"""The parity task with data that draws random numbers, or that comes as a stream of some kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset, IterableDataset

from harness.tasks import Task, TaskConfig
from tests.support.tasks import parity_task


class Drawing(Dataset):  # type: ignore[type-arg]
    """Replaces a tenth of the tokens each time a sample is read."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[index]
        tokens = sample["input_ids"]
        return {**sample, "input_ids": torch.where(torch.rand(tokens.shape) < 0.1, 1, tokens)}


class Stateless(IterableDataset):  # type: ignore[type-arg]
    """A stream that can only be read from its beginning."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return (self.samples[i] for i in range(len(self.samples)))


def build(config: TaskConfig) -> Task:
    """`kind` is random, arrow, shuffled or stateless; of arrow there are three shards, so that workers end in turn."""
    options = dict(config.task_args or {})
    kind = options.pop("kind")
    task = parity_task.build(replace(config, task_args=options))
    if kind == "random":
        return replace(task, train_dataset=Drawing(task.train_dataset))
    if kind == "stateless":
        return replace(task, train_dataset=Stateless(task.train_dataset))
    rows = [{name: value.tolist() for name, value in sample.items()} for sample in task.train_dataset.samples]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3)
    if kind == "shuffled":
        stream = stream.shuffle(seed=1, buffer_size=20)
    return replace(task, train_dataset=stream.with_format("torch"))
