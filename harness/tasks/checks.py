"""Build a task by its name, and check what the builder returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.errors import ConfigError
from harness.tasks import Builder, Task, TaskConfig, resolve

# What is called of a task, where it is given.
FUNCTIONS = (
    *("compute_loss_func", "check", "metrics", "generate", "sample"),
    *("describe_predictions", "predict_samples", "complete", "draw"),
    *("after_step", "after_evaluation", "build_optimizer"),
)


def build_task(config: TaskConfig, builder: Builder | None = None) -> Task:
    """
    Call the builder of --task, or the one that harness.run has made of its arguments.

    Raises ConfigError, which names it, if it returns no usable Task.
    """
    flag = f"--task={config.task}" if builder is None else "harness.run"
    builder = resolve(config.task) if builder is None else builder
    if not callable(builder):
        raise ConfigError(f"{flag} is no function but {_shown(builder)}; name one that takes a TaskConfig.")
    try:
        task: Any = builder(config)
    except TypeError as error:
        if not str(error).startswith("Task.__init__()"):
            raise
        raise ConfigError(f"{flag} makes a Task with other arguments than it has: {error}.") from error
    if not isinstance(task, Task):
        raise ConfigError(f"{flag} returned {_shown(task)}; let it return a harness.tasks.Task.")
    check_task(task, flag)
    return task


def check_task(task: Task, given: str) -> None:
    """Raise ConfigError, which begins with what was `given`, for a field that is something else than it must be."""
    if not isinstance(task.model, torch.nn.Module):
        raise ConfigError(f"{given}: model is {_shown(task.model)}; give a torch.nn.Module.")
    if getattr(task.model, "is_distributed_loading_by_transformers", False):
        raise ConfigError(
            f"{given}: the model was sharded when it was loaded (distributed_config), which could not be resumed; load "
            "it whole, and let launch_configs/fsdp2.yaml shard it."
        )
    if not callable(task.data_collator):
        raise ConfigError(
            f"{given}: data_collator is {_shown(task.data_collator)}; give a function from a list of samples to a "
            "dict of tensors, e.g. transformers.default_data_collator."
        )
    for name in FUNCTIONS:
        if (value := getattr(task, name)) is not None and not callable(value):
            raise ConfigError(f"{given}: {name} is {_shown(value)}, which can't be called; give a function, or None.")
    sets = task.eval_dataset if isinstance(task.eval_dataset, Mapping) else {"": task.eval_dataset}
    named = {f"eval_dataset[{name!r}]" if name else "eval_dataset": samples for name, samples in sets.items()}
    for name, samples in {"train_dataset": task.train_dataset, **named, "test_dataset": task.test_dataset}.items():
        if samples is not None and not (hasattr(samples, "__getitem__") or hasattr(samples, "__iter__")):
            raise ConfigError(f"{given}: {name} is {_shown(samples)}; give samples that can be indexed or iterated.")
    _check_metrics(task, given)


def _check_metrics(task: Task, given: str) -> None:
    if task.metrics is None:
        return
    metrics = task.metrics()
    lacking = [name for name in ("predictions", "update", "compute") if not callable(getattr(metrics, name, None))]
    if lacking:
        raise ConfigError(
            f"{given}: metrics() returned {_shown(metrics)} without {' and '.join(lacking)}; give an object like "
            "harness.tasks.Metrics, which is fed batch by batch (the Trainer's compute_metrics is not)."
        )
    names: Any = getattr(metrics, "names", None)
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{given}: names of metrics() is {_shown(names)}; give the keys of compute(), a tuple of texts."
        )


def _shown(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{value!r}" if isinstance(value, str | int | float) else f"a {type(value).__name__}"
