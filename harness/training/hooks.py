"""Call the functions that a task brings for the loop, and check what they return."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from harness.distributed.sharding import joined
from harness.errors import ConfigError
from harness.tasks import Task, View

logger = logging.getLogger(__name__)

# What the loop itself writes into rows, and what W&B's columns and histograms are called.
OF_THE_LOOP = (
    *("loss", "grad_norm", "learning_rate", "epoch", "step", "global_step", "num_input_tokens_seen", "total_flos"),
    *("num_nonfinite_losses", "num_skipped_steps"),
)
# The loss per token, for the trackers.
OF_EVALUATIONS = ("loss_per_token", "num_tokens")
PREFIXES_OF_THE_LOOP = ("train_", "train/", "eval_", "eval/", "test_", "test/", "gradients/", "parameters/", "_")


class Hooks:
    """The functions of a task that the loop calls. Raises ConfigError for logged_outputs that can't be logged."""

    def __init__(self, task: Task) -> None:
        self.after_step, self.after_evaluation = task.after_step, task.after_evaluation
        self.build_optimizer = task.build_optimizer
        self.logged_outputs = _names(task.logged_outputs)
        self._has_warned: set[str] = set()

    def values_of_step(self, *given: Any) -> dict[str, float]:
        """
        Collective: call after_step; returns its values by name, {} for none.

        Raises ConfigError for what is no value, and for names that the loop writes itself.
        """
        if self.after_step is None:
            return {}
        values = self._call("after_step", self.after_step, *given)
        for name in values:
            if is_of_the_loop(name) or name in self.logged_outputs:
                raise ConfigError(
                    f"{_shown('after_step', self.after_step)} returned a value called {name}, which the loop writes "
                    "itself; name it differently (W&B shows NAME as train/NAME)."
                )
        return values

    def with_values(self, metrics: Mapping[str, float], view: View) -> dict[str, float]:
        """
        Collective: return an evaluation's metrics with the values that after_evaluation has for it, if there is one.

        Raises ConfigError as `values_of_step` does.
        """
        if self.after_evaluation is None:
            return dict(metrics)
        values = self._call("after_evaluation", self.after_evaluation, view, dict(metrics))
        own = {f"{view.eval_set}_{name}": value for name, value in values.items()}
        for name in values:
            taken = f"{view.eval_set}_{name}" in metrics or name in OF_EVALUATIONS
            if taken or is_of_the_loop(name):
                raise ConfigError(
                    f"{_shown('after_evaluation', self.after_evaluation)} returned a value called {name}, which the "
                    f"evaluation has already; name it differently (NAME becomes {view.eval_set}_NAME)."
                )
        return {**metrics, **own}

    def optimizer(self, model: torch.nn.Module) -> Any:
        """Return what build_optimizer returned for the model, groups or an optimizer; None without that function."""
        if self.build_optimizer is None:
            return None
        with named("build_optimizer", self.build_optimizer):
            made = self.build_optimizer(model)
        if made is None:
            raise ConfigError(f"{_shown('build_optimizer', self.build_optimizer)} returned None; return groups.")
        return made

    def _call(self, kind: str, function: Callable[..., Any], *given: Any) -> dict[str, float]:
        with named(kind, function):
            returned = function(*given)
        if returned is None:
            return {}
        start = f"{_shown(kind, function)} returned"
        if not isinstance(returned, Mapping):
            raise ConfigError(f"{start} {_described(returned)}; return values by name, as in {{'name': 0.5}}, or None.")
        values: dict[str, float] = {}
        for name, value in returned.items():
            if not isinstance(name, str) or not name:
                raise ConfigError(f"{start} a value called {name!r}; a name is a text.")
            number = _number(value)
            if number is None:
                raise ConfigError(
                    f"{start} {_described(value)} as {name}; a value is a number or a tensor of one element."
                )
            if not math.isfinite(number) and name not in self._has_warned:
                logger.warning("%s %s as %s; it is recorded as it is.", start, number, name)
                self._has_warned.add(name)
            values[name] = number
        return values


@contextmanager
def named(kind: str, function: Callable[..., Any]) -> Iterator[None]:
    """Say in the log which function of the task an error is from; it is raised as it is."""
    try:
        yield
    except Exception:
        logger.error("%s has failed:", _shown(kind, function))
        raise


def is_of_the_loop(name: str) -> bool:
    """Whether the loop writes values of this name."""
    return name in OF_THE_LOOP or name.startswith(PREFIXES_OF_THE_LOOP)


def _names(logged_outputs: Sequence[str]) -> tuple[str, ...]:
    if isinstance(logged_outputs, str):
        raise ConfigError(f"The task's logged_outputs is {logged_outputs!r}; give names, as in ('{logged_outputs}',).")
    for name in logged_outputs:
        if is_of_the_loop(name):
            raise ConfigError(f"The task's logged_outputs name {name}, which the loop writes itself; leave it out.")
    return tuple(dict.fromkeys(logged_outputs))


def _number(value: Any) -> float | None:
    """Return a number of Python's; None if it is none. Collective for a scalar that FSDP2 has spread over the ranks."""
    if isinstance(value, torch.Tensor):
        value = joined(value.detach()).item() if value.numel() == 1 else None
    elif isinstance(value, np.generic | np.ndarray):
        value = value.item() if value.size == 1 else None
    if isinstance(value, bool):
        return int(value)
    return value if isinstance(value, int | float) else None


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"a {type(value).__name__} of shape {list(value.shape)}"
    return f"a {type(value).__name__}"


def _shown(kind: str, function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"The task's {kind} ({getattr(function, '__module__', '?')}.{name})"
