"""The plan of a run: how many steps it has, and what is due at which step."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from harness.errors import ConfigError
from harness.training.flags import PlanConfig
from harness.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Due:
    """What to do after a step, in this order."""

    log: bool
    evaluate: bool
    save: bool
    generate: bool = False


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
    generate_steps: int | None = None

    def at_step(self, state: TrainState) -> Due:
        """Return what is due after an optimizer step."""
        config, step = self.config, state.global_step
        last = step >= self.max_steps
        late_enough = config.eval_delay <= step
        return Due(
            log=(step == 1 and config.logging_first_step)
            or (config.logging_strategy == "steps" and step % self.logging_steps == 0),
            evaluate=config.eval_strategy == "steps" and late_enough and (last or step % self.eval_steps == 0),
            save=config.save_strategy == "steps" and (last or step % self.save_steps == 0),
            generate=self.generate_steps is not None and step % self.generate_steps == 0,
        )

    def at_epoch_end(self, state: TrainState) -> Due:
        """Return what is due when an epoch, or the training, has ended."""
        config = self.config
        return Due(
            log=config.logging_strategy == "epoch",
            evaluate=config.eval_strategy == "epoch" and config.eval_delay <= state.epoch,
            save=config.save_strategy == "epoch",
        )

    def num_saves(self, *, from_step: int) -> int:
        """Return how many checkpoints are due after a step; of those that depend on evaluations none is counted."""
        strategy, left = self.config.save_strategy, self.max_steps - from_step
        if strategy not in ("steps", "epoch") or self.num_train_epochs == sys.maxsize:
            return 0
        return math.ceil(left / (self.save_steps if strategy == "steps" else self.updates_per_epoch))

    def show_in(self, state: TrainState) -> None:
        """Write the resolved numbers into the fields that `trainer_state.json` has for them."""
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
    samples_per_step: float,
) -> Plan:
    """
    Compute the plan from the data: batches of a rank in an epoch and samples in all, None for a stream.

    Raises ConfigError if there are no batches at all, and for a stream without --max_steps.
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
