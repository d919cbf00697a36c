"""Tasks that miss something or go wrong, all on the model and data of parity_task."""

from __future__ import annotations

import dataclasses
import signal
from typing import Any

import torch

from harness.tasks import Task, TaskConfig
from tests.support.tasks import parity_task


class Poison(torch.nn.Module):
    """Passes its input on, until a call that makes it NaN."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, hidden: Any) -> Any:
        self.calls -= 1
        return hidden * float("nan") if self.calls == 0 else hidden


def without_evaluation(config: TaskConfig) -> Task:
    return dataclasses.replace(parity_task.build(config), eval_dataset=None)


def without_training_data(config: TaskConfig) -> Task:
    return dataclasses.replace(parity_task.build(config), train_dataset=None)


def empty(config: TaskConfig) -> Task:
    return dataclasses.replace(parity_task.build(config), train_dataset=[])


def no_checkpointing(config: TaskConfig) -> Task:
    task = parity_task.build(config)
    task.model.supports_gradient_checkpointing = False  # type: ignore[assignment]
    return task


def broken(config: TaskConfig) -> Task:
    raise KeyError("a bug in the task")


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


def interrupted(config: TaskConfig) -> Task:
    """As Ctrl-C while the third batch is drawn."""

    def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return parity_task.collate(samples)

    calls: list[int] = []
    return dataclasses.replace(parity_task.build(config), data_collator=collate)


def out_of_memory(config: TaskConfig) -> Task:
    def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore text.")

    return dataclasses.replace(parity_task.build(config), data_collator=collate)


class Plain(torch.nn.Module):
    """No model of transformers, and NaN from its second batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(parity_task.VOCABULARY, 8)
        self.poison = Poison(calls=2)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: Any, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": self.head(self.poison(self.embedding(input_ids))).square().mean()}


def plain(config: TaskConfig) -> Task:
    return dataclasses.replace(parity_task.build(config), model=Plain(), metrics=None)
