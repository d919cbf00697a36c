"""When tables of predictions are due: with which evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Epochs are fractions added up: what is nearer than this is the same.
SAME_EPOCH = 1e-6


def is_due(epoch: float, previous: float | None, freq: int) -> bool:
    """
    Whether the evaluation at `epoch` is the first at or after a multiple of `freq` epochs; steps are counted alike.

    `previous` is the epoch of the evaluation before, None at the first one. At epoch 0 nothing is due.
    """
    passed, passed_before = (math.floor((at + SAME_EPOCH) / freq) for at in (epoch, previous or 0.0))
    return passed > passed_before


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """When an evaluation was made."""

    epoch: float
    step: int


@dataclass(frozen=True, kw_only=True)
class Every:
    """How often tables are due: every so many epochs, every so many steps, or by both; None: not by these."""

    epochs: int | None
    steps: int | None = None

    def is_due(self, epoch: float, step: int, before: Evaluated | None) -> bool:
        """Whether an evaluation has tables, given the one before it, which is None at the first one."""
        last_epoch, last_step = (None, None) if before is None else (before.epoch, before.step)
        by_epochs = self.epochs is not None and is_due(epoch, last_epoch, self.epochs)
        return by_epochs or (self.steps is not None and is_due(step, last_step, self.steps))

    def __str__(self) -> str:
        parts = (_counted(self.epochs, "epoch"), _counted(self.steps, "step"))
        return " and every ".join(part for part in parts if part)


def _counted(number: int | None, unit: str) -> str:
    return "" if number is None else unit if number == 1 else f"{number} {unit}s"


def last_evaluation(log_history: Sequence[Mapping[str, Any]]) -> Evaluated | None:
    """When the last evaluation in a Trainer's history was, which a checkpoint brings back; None for none."""
    entries = (row for row in reversed(log_history) if any(name.startswith("eval_") for name in row))
    return next((Evaluated(epoch=float(row["epoch"]), step=int(row["step"])) for row in entries), None)
