"""Tasks as users write them: losses, metrics and labels of other kinds and names, builders that forget something."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from torch.distributed.tensor import DTensor

from harness.tasks import Task, TaskConfig
from harness.training.evaluation import CACHE
from tests.support.tasks import parity_task


class Regression(torch.nn.Module):
    """No model of transformers: the mean square error of a linear layer; `as_loss` makes of it what it returns."""

    def __init__(self, as_loss: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.as_loss = torch.nn.Linear(3, 1), as_loss

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        found = self.linear(x).squeeze(-1)
        return found if labels is None else self.as_loss((found - labels).square())


class Targets(torch.nn.Module):
    """Takes what is to be predicted as `targets`, or as `targets` and `others`."""

    def __init__(self, *, takes_others: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 2 if takes_others else 1)

    def forward(self, x: torch.Tensor, targets: Any = None, others: Any = None) -> dict[str, torch.Tensor]:
        logits = self.linear(x)
        if targets is None:
            return {"logits": logits}
        wanted = targets if others is None else torch.stack([targets, others], dim=-1)
        return {"loss": (logits.squeeze(-1) - wanted).square().mean(), "logits": logits}


class Constant:
    """A score that is the same for each evaluation."""

    def __init__(self, values: Mapping[str, Any], names: Any = None) -> None:
        self.values = dict(values)
        self.names = tuple(values) if names is None else names

    def predictions(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)  # type: ignore[no-any-return]

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """Add nothing."""

    def compute(self) -> dict[str, float]:
        return self.values


class LargestError:
    """The largest difference between what was predicted and one of the labels, whatever their number."""

    names = ("largest_error",)

    def __init__(self) -> None:
        self.largest = 0.0

    def predictions(self, logits: torch.Tensor, labels: Any) -> torch.Tensor:
        return logits.squeeze(-1)

    def update(self, predictions: torch.Tensor, labels: Any) -> None:
        wanted = labels if predictions.dim() == 1 else torch.stack(list(labels), dim=-1)
        self.largest = max(self.largest, (predictions - wanted).abs().max().item())

    def compute(self) -> dict[str, float]:
        return {"largest_error": self.largest}


LOSSES: dict[str, Callable[[torch.Tensor], Any]] = {
    "scalar": lambda errors: {"loss": errors.mean()},
    "one element": lambda errors: {"loss": errors.mean().reshape(1)},
    "tuple": lambda errors: (errors.mean(), errors),
    "none": lambda _errors: {"loss": None},
    "a tuple of none": lambda errors: (None, errors),
    "nothing": lambda _errors: None,
    "an empty tuple": lambda _errors: (),
    "no key": lambda errors: {"logits": errors},
    "a vector": lambda errors: {"loss": errors},
    "a number": lambda errors: {"loss": errors.mean().item()},
    "a bare tensor": lambda errors: errors.mean(),
    "a text": lambda _errors: "loss",
    "detached": lambda errors: {"loss": errors.mean().detach()},
    "whole numbers": lambda errors: {"loss": errors.mean().long()},
}
METRICS: dict[str, Any] = {
    "float": 0.25,
    "numpy float32": np.float32(0.25),
    "numpy int64": np.int64(3),
    "numpy array": np.array(0.25),
    "tensor": torch.tensor(0.25),
    "tensor bf16": torch.tensor([0.25], dtype=torch.bfloat16),
    "int": 3,
    "bool": True,
    "numpy bool": np.bool_(True),
    "nan": float("nan"),
    "numpy nan": np.float64("nan"),
    "none": None,
    "text": "0.25",
    "list": [0.25],
    "array": np.array([0.25, 0.5]),
    "tensors": torch.tensor([0.25, 0.5]),
    "complex": 1j,
}


def rows(count: int, *names: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "x": torch.randn(3, generator=generator),
            **{name: torch.randn((), generator=generator) for name in names},
        }
        for _ in range(count)
    ]


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def with_loss(config: TaskConfig) -> Task:
    """A loss of the kind `loss`, from the model or, with `own`, from compute_loss_func."""
    given = dict(config.task_args or {})
    kind = LOSSES[given.pop("loss")]
    own = given.pop("own", False)

    def computed(outputs: Any, labels: Any, num_items: Any) -> Any:
        found = kind((outputs - labels).square())
        return found["loss"] if isinstance(found, dict) and "loss" in found else found

    return Task(
        model=Regression(kind),
        train_dataset=rows(16, "labels"),
        data_collator=collate,
        compute_loss_func=computed if own else None,
    )


def with_targets(config: TaskConfig) -> Task:
    """Labels that are called `targets`; with `several` there are `others` too."""
    several = bool((config.task_args or {}).get("several"))
    names = ("targets", "others") if several else ("targets",)
    return Task(
        model=Targets(takes_others=several),
        train_dataset=rows(21, *names),
        eval_dataset=rows(11, *names),
        data_collator=collate,
        metrics=LargestError,
    )


def with_output_named_cache(config: TaskConfig) -> Task:
    """The same; the one output beside the loss has the name of what decoders keep."""

    class Cached(Targets):
        def forward(self, x: torch.Tensor, targets: Any = None, others: Any = None) -> dict[str, torch.Tensor]:
            found = super().forward(x, targets, others)
            return {"loss": found["loss"], CACHE: found["logits"]}

    return dataclasses.replace(with_targets(config), model=Cached(takes_others=False))


def with_return_loss(config: TaskConfig) -> Task:
    """No labels: a loss of the inputs alone, as CLIP's, which an evaluation has because of `return_loss`."""

    class Returning(Targets):
        def forward(self, x: torch.Tensor, targets: Any = None, return_loss: bool = True) -> dict[str, torch.Tensor]:
            return super().forward(x, x[:, 0] ** 2 if return_loss else None)

    task = with_targets(config)
    return dataclasses.replace(task, model=Returning(takes_others=False), metrics=None)


def with_renamed_targets(config: TaskConfig) -> Task:
    """Samples of `datasets` with a column `wanted`, which the collator gives the model as `targets` too."""

    def renamed(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.tensor([sample[name] for sample in samples]) for name in samples[0]}
        return {**batch, "targets": batch["wanted"]}

    class Renamed(Targets):
        def forward(self, x: torch.Tensor, targets: Any = None, **_others: Any) -> dict[str, torch.Tensor]:
            return super().forward(x, targets)

    plain = [{name: value.tolist() for name, value in row.items()} for row in rows(21, "wanted")]
    data = datasets.Dataset.from_list(plain)
    return Task(model=Renamed(takes_others=False), train_dataset=data, eval_dataset=data, data_collator=renamed)


def watching_shards(config: TaskConfig) -> Task:
    """The parity task; a batch of the training that is made while a rank holds whole weights raises."""
    task = parity_task.build(config)

    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        whole = [name for name, parameter in task.model.named_parameters() if not isinstance(parameter, DTensor)]
        if task.model.training and whole:
            raise RuntimeError(f"whole weights at the begin of the training: {', '.join(whole)}")
        return parity_task.collate(samples)

    return dataclasses.replace(task, data_collator=collate)


def with_metric(config: TaskConfig) -> Task:
    """The parity task with a metric `value` of the kind that the arguments name, `names` as they say."""
    given = dict(config.task_args or {})
    values, names = {"value": METRICS[given["metric"]]}, given.get("names")
    task = parity_task.build(dataclasses.replace(config, task_args=None))
    return dataclasses.replace(task, metrics=lambda: Constant(values, names))


def nothing(config: TaskConfig) -> Any:
    parity_task.build(config)


def a_model(config: TaskConfig) -> Any:
    return parity_task.build(config).model


def the_class(config: TaskConfig) -> Any:
    return Task


def incomplete(config: TaskConfig) -> Any:
    return Task(model=parity_task.build(config).model)  # type: ignore[call-arg]


def misspelt(config: TaskConfig) -> Any:
    task = parity_task.build(config)
    return Task(model=task.model, train_data=task.train_dataset, data_collator=task.data_collator)  # type: ignore[call-arg]


def no_model(config: TaskConfig) -> Any:
    return dataclasses.replace(parity_task.build(config), model=None)  # type: ignore[arg-type]


def sharded_at_load(config: TaskConfig) -> Any:
    task = parity_task.build(config)
    task.model.__class__ = type("Sharded", (type(task.model),), {"is_distributed_loading_by_transformers": True})
    return task


def no_collator(config: TaskConfig) -> Any:
    return dataclasses.replace(parity_task.build(config), data_collator=None)  # type: ignore[arg-type]


def a_number_of_samples(config: TaskConfig) -> Any:
    return dataclasses.replace(parity_task.build(config), train_dataset=100)


def metrics_made_already(config: TaskConfig) -> Any:
    return dataclasses.replace(parity_task.build(config), metrics=Constant({"value": 1.0}))  # type: ignore[arg-type]


def metrics_of_the_trainer(config: TaskConfig) -> Any:
    return dataclasses.replace(parity_task.build(config), metrics=lambda: {"accuracy": 1.0})  # type: ignore[arg-type, return-value]


def metrics_without_names(config: TaskConfig) -> Any:
    return dataclasses.replace(parity_task.build(config), metrics=lambda: Constant({"value": 1.0}, names="value"))


def not_callable(config: TaskConfig) -> Any:
    return dataclasses.replace(parity_task.build(config), compute_loss_func="mse")  # type: ignore[arg-type]


def no_argument() -> Any:
    return None


A_NUMBER = 5
