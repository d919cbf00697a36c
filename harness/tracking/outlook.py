"""What W&B will show of a training and when, and which settings show nothing: said at its start, not found later."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

from harness.tracking.artifacts.upload import registry_path
from harness.tracking.flags import TrackingConfig
from harness.tracking.media.due import Evaluated, is_due
from harness.training.plan import Plan

MOST_EVALUATIONS = 100_000  # to look at one by one, a tenth of a second


def outlook(
    config: TrackingConfig, plan: Plan, *, from_step: int, evaluated: Evaluated | None = None, is_offline: bool
) -> list[str]:
    """
    Return a line for each setting that asks W&B to show something, from a step to the end of the plan.

    `evaluated` is the last evaluation before that step.
    """
    if from_step >= plan.max_steps:
        return []
    due = _due(config, plan, from_step, evaluated)
    unseen = [*_of_steps(config, plan, from_step=from_step), *_of_evaluations(config, plan, has_tables=bool(due))]
    lines = [f"{flag} shows nothing in this run: {what}. {remedy}" for flag, what, remedy in unseen]
    if not config.sends:
        return lines
    seen = [_histograms(config, plan, from_step), _tables(config, due), _link(config, is_offline)]
    return [*lines, *(line for line in seen if line)]


def _of_steps(config: TrackingConfig, plan: Plan, *, from_step: int) -> list[tuple[str, str, str]]:
    """Return flag, reason and remedy of what is due every so many steps and never comes."""
    last, every = plan.max_steps, plan.logging_steps
    left = f"the training has {last} steps" if from_step == 0 else f"steps {from_step + 1} to {last} are left"
    found = []
    logs_first = plan.config.logging_first_step and from_step == 0
    if plan.config.logging_strategy == "steps" and not logs_first and not is_due(last, from_step, every):
        found.append((f"--logging_steps {every}", f"the loss is reported every {every} steps, {left}", "Give fewer."))
    watched, every = config.wandb_watch, max(100, every)
    if config.uses_wandb and watched != "false" and not is_due(last, from_step, every):
        what = f"histograms are due every {every} steps (100, or --logging_steps if that is more), {left}"
        found.append((f"--wandb_watch {watched}", what, "Train longer, or leave it out."))
    if (steps := plan.generate_steps) is not None and not is_due(last, from_step, steps):
        found.append((f"--generate_steps {steps}", f"texts are due every {steps} steps, {left}", "Give fewer."))
    return found


def _of_evaluations(config: TrackingConfig, plan: Plan, *, has_tables: bool) -> list[tuple[str, str, str]]:
    """Return flag, reason and remedy of evaluations, and of the tables with them, that never come."""
    strategy, delay = plan.config.eval_strategy, plan.config.eval_delay
    end = plan.max_steps / plan.updates_per_epoch
    length, unit = (plan.max_steps, "step") if strategy == "steps" else (end, "epoch")
    found = []
    if strategy != "no" and delay > length:
        what = f"evaluations begin at {unit} {delay:g}, the training ends at {unit} {length:.4g}"
        found.append((f"--eval_delay {delay:g}", what, "Give less."))
    elif config.uses_wandb and config.wandb_eval_samples is not None and not has_tables:
        often = config.tables_every
        what = f"tables are due every {often}, the training ends at epoch {end:.4g}, step {plan.max_steps}"
        remedy = "Give fewer." if often.epochs is None else "Give a smaller --wandb_eval_samples_freq."
        found.append((f"--wandb_eval_samples {config.wandb_eval_samples}", what, remedy))
    return found


def _histograms(config: TrackingConfig, plan: Plan, from_step: int) -> str:
    every = max(100, plan.logging_steps)
    count = plan.max_steps // every - from_step // every
    if config.wandb_watch == "false" or count == 0:
        return ""
    what = {"all": "gradients and parameters"}.get(config.wandb_watch, config.wandb_watch)
    first = (from_step // every + 1) * every
    return f"W&B will show histograms of {what} every {every} steps: {_times(count)}, the first after step {first}."


def _tables(config: TrackingConfig, due: list[Evaluated]) -> str:
    if not due:
        return ""
    first = f"step {due[0].step} (epoch {due[0].epoch:.4g})"
    what = f"{config.wandb_eval_samples} predictions with an evaluation every {config.tables_every}"
    return f"W&B will show a table of {what}: {_times(len(due))}, the first after {first}."


def _link(config: TrackingConfig, is_offline: bool) -> str:
    if config.wandb_registry is None:
        return ""
    when = "`harness sync` has uploaded it: the run is offline" if is_offline else "the training has ended"
    return f"W&B will show the final model in the registry as {registry_path(config.wandb_registry)} when {when}."


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _due(config: TrackingConfig, plan: Plan, from_step: int, before: Evaluated | None) -> list[Evaluated]:
    """Return the evaluations that have tables, among the next MOST_EVALUATIONS."""
    every, found = config.tables_every, list[Evaluated]()
    if config.wandb_eval_samples is None:
        return found
    for now in islice(_evaluations(plan, from_step), MOST_EVALUATIONS):
        if every.is_due(now.epoch, now.step, before):
            found.append(now)
        before = now
    return found


def _evaluations(plan: Plan, from_step: int) -> Iterator[Evaluated]:
    """Yield the evaluations that are still to come, as `Plan` makes them due."""
    strategy, delay, each = plan.config.eval_strategy, plan.config.eval_delay, plan.updates_per_epoch
    every = plan.eval_steps if strategy == "steps" else each
    for number in range(from_step // every + 1, math.ceil(plan.max_steps / every) + 1):
        step = min(number * every, plan.max_steps)
        if strategy != "no" and delay <= (step if strategy == "steps" else step / each):
            yield Evaluated(epoch=step / each, step=step)
