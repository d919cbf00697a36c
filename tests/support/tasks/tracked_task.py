"""A task of which one process and several make the same numbers: samples of one length, no dropout, with a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from harness.config import Json
from harness.tasks import SamplePredictions, Task, TaskConfig
from tests.support.tasks import parity_task
from tests.support.tasks.faulty_task import write_time

LENGTH = 16


class Timed(list[dict[str, torch.Tensor]]):
    """Samples; the file `times` gets a line for each batch that is drawn."""

    def __init__(self, samples: list[dict[str, torch.Tensor]], times: Path) -> None:
        super().__init__(samples)
        self.times = times

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        write_time(self.times)
        return [self[index] for index in indices]


def samples(size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Tokens that each follow from the one before, but for some noise."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(1, 64, (size, 1), generator=generator)
    tokens = (starts + 3 * torch.arange(LENGTH)) % 63 + 1
    noise = torch.rand(tokens.shape, generator=generator) < 0.1
    tokens = torch.where(noise, torch.randint(1, 64, tokens.shape, generator=generator), tokens)
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def predict_samples(model: torch.nn.Module, chosen: Sequence[dict[str, torch.Tensor]]) -> SamplePredictions:
    """The last token, and how likely the model found it."""
    rows: list[list[str | float | int]] = []
    for sample in chosen:
        scores = model(input_ids=sample["input_ids"].unsqueeze(0)).logits[0, -2].softmax(-1)
        label = int(sample["labels"][-1])
        rows.append([" ".join(map(str, sample["input_ids"][:-1].tolist())), label, float(scores[label])])
    return SamplePredictions(columns=("inputs", "labels", "probability"), rows=rows)


def build(config: TaskConfig) -> Task:
    times = Path((config.task_args or {})["times"])
    task = parity_task.build(replace(config, task_args=Json({"dropout": 0.0})))
    if os.environ.get("RANK", "0") != "0":
        times = times.with_name(f"{times.name}-{os.environ['RANK']}")
    return replace(
        task,
        train_dataset=Timed(samples(64, seed=7), times),
        eval_dataset=samples(21, seed=9),
        predict_samples=predict_samples,
    )
