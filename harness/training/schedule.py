"""How long a run is, and what is due at which step."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from harness.config import arg, at_least, choice
from harness.errors import ConfigError
from harness.training.state import TrainState

INTERVALS = ("no", "steps", "epoch")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Length and cadence, with the Trainer's names and defaults."""

    num_train_epochs: float = arg(3.0, "Epochs to train; a fraction ends inside an epoch.")
    max_steps: int = arg(-1, "Optimizer steps to train; above 0 it replaces --num_train_epochs.")
    logging_strategy: str = arg("steps", "When to log: no, steps, epoch.")
    logging_steps: float = arg(500, "Steps between logs; below 1: a share of all steps.")
    logging_first_step: bool = arg(False, "Log the first step too.")
    eval_strategy: str = arg("no", "When to evaluate: no, steps, epoch.")
    eval_steps: float | None = arg(help="Steps between evaluations; below 1: a share. Default: --logging_steps.")
    eval_delay: float = arg(0, "Epochs or steps to wait before the first evaluation.")
    eval_on_start: bool = arg(False, "Evaluate before the first step.")
    save_strategy: str = arg("steps", "When to save a checkpoint: no, steps, epoch, best.")
    save_steps: float = arg(500, "Steps between checkpoints; below 1: a share of all steps.")

    def __post_init__(self) -> None:
        choice("logging_strategy", self.logging_strategy, INTERVALS)
        choice("eval_strategy", self.eval_strategy, INTERVALS)
        choice("save_strategy", self.save_strategy, (*INTERVALS, "best"))
        at_least(0, eval_delay=self.eval_delay)
        if not math.isfinite(self.num_train_epochs) or (self.max_steps <= 0 and self.num_train_epochs <= 0):
            raise ConfigError(f"--num_train_epochs={self.num_train_epochs}: use more than 0, or give --max_steps.")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ConfigError(f"--max_steps={self.max_steps}: use 1 or more, or leave it out to count epochs.")
        for kind in ("logging", "eval", "save"):
            steps = getattr(self, f"{kind}_steps")
            if getattr(self, f"{kind}_strategy") != "steps" or steps is None:
                continue
            if not 0 < steps < math.inf:
                raise ConfigError(f"--{kind}_steps={steps}: use 1 or more, or a share of all steps below 1.")
            if steps > 1 and steps != int(steps):
                raise ConfigError(f"--{kind}_steps={steps}: use a whole number, or a share of all steps below 1.")
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ConfigError("--save_strategy=best needs evaluations: give --eval_strategy steps or epoch.")


@dataclass(frozen=True, kw_only=True)
class Due:
    """What happens at a step, in this order."""

    log: bool
    evaluate: bool
    save: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    The numbers of a run, resolved; steps are optimizer steps, batches are micro-batches of a rank.

    Mirrors Trainer.set_initial_training_values, TrainerState.compute_steps and DefaultFlowCallback.
    """

    config: PlanConfig
    max_steps: int
    num_train_epochs: int
    updates_per_epoch: int
    batches_per_epoch: int
    num_samples: float
    logging_steps: int
    eval_steps: int
    save_steps: int

    def at_step(self, state: TrainState) -> Due:
        """What is due after an optimizer step."""
        config, step = self.config, state.global_step
        last = step >= self.max_steps
        late_enough = config.eval_delay <= step
        return Due(
            log=(step == 1 and config.logging_first_step)
            or (config.logging_strategy == "steps" and step % self.logging_steps == 0),
            evaluate=config.eval_strategy == "steps" and late_enough and (last or step % self.eval_steps == 0),
            save=config.save_strategy == "steps" and (last or step % self.save_steps == 0),
        )

    def at_epoch_end(self, state: TrainState) -> Due:
        """What is due when an epoch, or the training, has ended."""
        config = self.config
        return Due(
            log=config.logging_strategy == "epoch",
            evaluate=config.eval_strategy == "epoch" and config.eval_delay <= state.epoch,
            save=config.save_strategy == "epoch",
        )

    def show_in(self, state: TrainState) -> None:
        """Put the resolved numbers where `trainer_state.json` holds them."""
        state.max_steps, state.num_train_epochs = self.max_steps, self.num_train_epochs
        state.logging_steps, state.eval_steps, state.save_steps = (
            self.logging_steps,
            self.eval_steps,
            self.save_steps,
        )


def resolve_plan(
    config: PlanConfig,
    *,
    num_batches: int | None,
    num_samples: int | None,
    accumulation: int,
    samples_per_step: int,
) -> Plan:
    """
    Work the plan out from the data: batches of a rank in an epoch and samples in all, None for a stream.

    Raises ConfigError for no batches at all, and for a stream without --max_steps.
    """
    if num_batches == 0:
        raise ConfigError(
            "The training data does not fill one batch; use a smaller --per_device_train_batch_size, "
            "more data, or --dataloader_drop_last false."
        )
    if num_batches is None:
        if config.max_steps < 0:
            raise ConfigError("A stream has no length, so epochs can't be counted: give --max_steps.")
        updates, epochs = config.max_steps, sys.maxsize
        batches = config.max_steps * accumulation
    else:
        updates = math.ceil(num_batches / accumulation)
        epochs = math.ceil(config.num_train_epochs)
        batches = num_batches
    max_steps = config.max_steps
    if max_steps < 0:
        max_steps = math.ceil(config.num_train_epochs * updates)
        samples = (num_samples or 0) * config.num_train_epochs
    else:
        samples = max_steps * samples_per_step
        if num_batches is not None:
            epochs = math.ceil(max_steps / updates)
    return Plan(
        config=config,
        max_steps=max_steps,
        num_train_epochs=epochs,
        updates_per_epoch=updates,
        batches_per_epoch=batches,
        num_samples=samples,
        logging_steps=_steps(config.logging_steps, max_steps),
        # The Trainer keeps its state's default where it does not evaluate.
        eval_steps=_steps(_eval_steps(config), max_steps),
        save_steps=_steps(config.save_steps, max_steps),
    )


def _eval_steps(config: PlanConfig) -> float:
    if config.eval_steps is not None:
        return config.eval_steps
    return config.logging_steps if config.eval_strategy == "steps" else 500


def _steps(steps: float, max_steps: int) -> int:
    return math.ceil(max_steps * steps) if steps < 1 else int(steps)
