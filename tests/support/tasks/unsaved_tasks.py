"""Tasks on the model and data of parity_task that can't be saved, from the start or later."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from harness.tasks import Task, TaskConfig
from tests.support.tasks import filling_task, parity_task


def config() -> TaskConfig:
    return TaskConfig(task="tests.support.tasks.unsaved_tasks:fine")


def fine(config: TaskConfig) -> Task:
    return parity_task.build(dataclasses.replace(config, task_args=None))


class Unserializable:
    """No value of JSON."""


def unserializable_config(config: TaskConfig) -> Task:
    task = fine(config)
    task.model.config.mine = Unserializable()  # type: ignore[union-attr, assignment]
    return task


def generation_config(config: TaskConfig) -> Task:
    task = fine(config)
    task.model.generation_config.temperature = 0.5  # type: ignore[union-attr, assignment]
    task.model.generation_config.do_sample = False  # type: ignore[union-attr, assignment]
    return task


def tied_by_hand(config: TaskConfig) -> Task:
    """Two blocks with one weight, which the model's class does not know of."""
    task = fine(config)
    first, second = task.model.transformer.h  # type: ignore[union-attr, misc]
    second.mlp.c_fc.weight = first.mlp.c_fc.weight
    return task


def sparse_weight(config: TaskConfig) -> Task:
    task = fine(config)
    task.model.register_buffer("sparse", torch.eye(3).to_sparse())
    return task


class Odd(torch.nn.Module):
    """Its state dict holds what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._register_state_dict_hook(self._add)

    @staticmethod
    def _add(_: torch.nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        state[f"{prefix}odd"] = {"count": 3}


def odd_state(config: TaskConfig) -> Task:
    task = fine(config)
    task.model.extra = Odd()
    return task


class Tokenizer:
    """Can be written `times` times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def save_pretrained(self, folder: Path) -> None:
        self.times -= 1
        if self.times < 0:
            raise RuntimeError("this tokenizer can't be written")


def tokenizer(config: TaskConfig) -> Task:
    return dataclasses.replace(fine(config), processing_class=Tokenizer(0))


def failing_later(config: TaskConfig) -> Task:
    """It is written once, when it is tried."""
    return dataclasses.replace(fine(config), processing_class=Tokenizer(1))


def odd_later(config: TaskConfig) -> Task:
    """The state dict can't be read once a batch has gone through the model."""
    task = fine(config)
    batches: list[int] = []

    def fail(*_: Any) -> None:
        if batches:
            raise RuntimeError("odd state")

    task.model.register_forward_pre_hook(lambda *_: batches.append(1))
    task.model.register_state_dict_pre_hook(fail)
    return task


class Unreadable(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        raise RuntimeError("no evaluation")


def failing_evaluation(config: TaskConfig) -> Task:
    return dataclasses.replace(fine(config), eval_dataset=Unreadable())


def wide(config: TaskConfig) -> Task:
    """A model of 420 kB, 1.2 MB with its optimizer."""
    shape = {"vocab_size": parity_task.VOCABULARY, "n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    return dataclasses.replace(fine(config), model=model)


def filling(config: TaskConfig) -> Task:
    """Something else fills the disk from the last sample on."""
    options = dict(config.task_args or {})
    task = fine(config)
    places = {"from_sample": 41, "to_sample": 10_000}
    samples = filling_task.FillsDisk(task.train_dataset, ballast=Path(options["fill"]), **places)
    return dataclasses.replace(task, train_dataset=samples)


class Views(torch.nn.Module):
    """A buffer that is the first rows of a weight, and two weights that are one if `tied`."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.register_buffer("first", torch.empty(0))
        self.embedding = torch.nn.Embedding(8, 4)
        self.head = torch.nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.first = self.embedding.weight.detach()[:3]
