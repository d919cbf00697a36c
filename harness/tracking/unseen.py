"""Which settings show nothing, since the training is too short for them: said at its start, not found at its end."""

from __future__ import annotations

from harness.tracking.flags import TrackingConfig
from harness.tracking.media.tables import is_due
from harness.training.plan import Plan


def unseen(config: TrackingConfig, plan: Plan, *, from_step: int) -> list[str]:
    """Return a line for each setting that shows nothing from a step to the end of the plan."""
    if from_step >= plan.max_steps:
        return []
    settings = [_of_steps(config, plan, from_step=from_step), _of_epochs(config, plan, from_step=from_step)]
    return [f"{flag} shows nothing in this run: {what}. {remedy}" for each in settings for flag, what, remedy in each]


def _of_steps(config: TrackingConfig, plan: Plan, *, from_step: int) -> list[tuple[str, str, str]]:
    """Return flag, reason and remedy of what is due every so many steps."""
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


def _of_epochs(config: TrackingConfig, plan: Plan, *, from_step: int) -> list[tuple[str, str, str]]:
    """Return flag, reason and remedy of evaluations and of tables, which are due by epochs."""
    strategy, delay = plan.config.eval_strategy, plan.config.eval_delay
    end, before = plan.max_steps / plan.updates_per_epoch, from_step / plan.updates_per_epoch
    length, unit = (plan.max_steps, "step") if strategy == "steps" else (end, "epoch")
    found = []
    if strategy != "no" and delay > length:
        what = f"evaluations begin at {unit} {delay:g}, the training ends at {unit} {length:.4g}"
        found.append((f"--eval_delay {delay:g}", what, "Give less."))
    samples, freq = config.wandb_eval_samples, config.wandb_eval_samples_freq
    if config.uses_wandb and samples is not None and not is_due(end, before, freq):
        what = f"tables are due every {freq} epochs, the training ends at epoch {end:.4g}"
        found.append((f"--wandb_eval_samples {samples}", what, "Give a smaller --wandb_eval_samples_freq."))
    return found
