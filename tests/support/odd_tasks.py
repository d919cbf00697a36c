"""Tasks that miss something or go wrong, all on the model and data of parity_task."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from harness.tasks import Task, TaskConfig
from tests.support import parity_task


class Poison(torch.nn.Module):
    """Passes its input on, until a call that makes it NaN."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls -= 1
        return hidden * float("nan") if self.calls == 0 else hidden


def without_evaluation(config: TaskConfig) -> Task:
    return dataclasses.replace(parity_task.build(config), eval_dataset=None)


def without_training_data(config: TaskConfig) -> Task:
    return dataclasses.replace(parity_task.build(config), train_dataset=None)


def empty(config: TaskConfig) -> Task:
    return dataclasses.replace(parity_task.build(config), train_dataset=[])


def not_a_number(config: TaskConfig) -> Task:
    """The MLP's dropout of the second block gives NaN from its second call on."""
    task = parity_task.build(config)
    task.model.transformer.h[1].mlp.dropout = Poison(calls=2)  # type: ignore[union-attr, index]
    return task


def with_breakpoint(config: TaskConfig) -> Task:
    def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
        batch = parity_task.collate(samples)
        if config.task_args and not seen:
            seen.append(1)
            breakpoint()  # noqa: T100
        return batch

    seen: list[int] = []
    return dataclasses.replace(parity_task.build(dataclasses.replace(config, task_args=None)), data_collator=collate)
