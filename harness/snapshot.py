"""Going on: a checkpoint put back into a run that is built, and what may differ between the two."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from harness.checkpoint.arguments import Changes, compare
from harness.checkpoint.find import Saved, describe_change
from harness.data.position import at_step, converted, has_other_layout, why_other_order
from harness.distributed.accelerator import software
from harness.distributed.backend import ZeroStepper
from harness.distributed.fsdp2 import has_optimizer_shards, is_fsdp, load_optimizer, read_optimizer
from harness.distributed.zero import LATEST_FILE, load_shards, zero_stage
from harness.errors import ConfigError
from harness.loop import Run
from harness.training.state import TRAINER_STATE_FILE, TrainState

logger = logging.getLogger(__name__)


def restore(run: Run, state: TrainState, saved: Saved) -> None:
    """
    Local: put a checkpoint, ours or a Trainer's, into a run whose weights are already loaded.

    Raises ConfigError if the data's order would not be the one that was saved.
    """
    state.load_trainer_state(saved.path / TRAINER_STATE_FILE)
    state.load_state_dict(saved.shared.get("state", {}))
    patience = run.best.config.early_stopping_patience
    state.should_stop = patience is not None and state.early_stopping_patience_counter >= patience
    best = state.best_model_checkpoint
    if best is not None and not Path(best).is_dir():  # as in a run that was moved, or came from W&B
        beside = saved.path.with_name(Path(best).name)
        state.best_model_checkpoint = str(beside) if beside.is_dir() else None
        if not beside.is_dir():
            logger.warning("The best checkpoint %s is gone; it can't be loaded at the end.", best)
    _restore_optimizer(run, saved)
    if run.accelerator.scaler is not None and "scaler.pt" in saved.files:
        run.accelerator.scaler.load_state_dict(saved.files["scaler.pt"])
    if change := describe_change(saved.shared.get("software", {}), software()):
        logger.warning("%s was saved with %s: numbers may differ in their last bits.", saved.path, change)
    changes, other_numbers = _check_changes(run, saved)
    if changes.told:
        run.console.line(f"Other arguments than those of {saved.path.name}: {', '.join(changes.told)}.")
    run.tracker.load_state_dict(saved.shared.get("tracking", {}), saved.path, changes=other_numbers)
    position, is_exact = _position(run, state, saved)
    if saved.rank_state is None:
        logger.warning("%s has no random state for this rank: the run goes on, but not to the bit.", saved.path)
        run.loader.load_position(position)
    else:
        ours = saved.rank_state.get("harness", {})
        # What was drawn ahead elsewhere is another batch here.
        run.loader.load_state_dict(position, ours.get("data", {}) if is_exact else {}, saved.rank_state)
        if saved.other_ranks and "window" in ours:
            run.window.load_state_dicts([other["harness"]["window"] for other in saved.other_ranks])
        elif "window" in ours:
            run.window.load_state_dict(ours["window"])
    if reason := run.loader.why_read_again:
        count = run.loader.batches_drawn
        run.console.line(f"The stream is read again up to its position, {count} batches of a rank: {reason}.")


def _check_changes(run: Run, saved: Saved) -> tuple[Changes, str]:
    """
    What differs from the arguments of the checkpoint, and what of that makes other numbers.

    Raises ConfigError for all at once that is not allowed.
    """
    changes = compare(saved.shared.get("arguments", {}), run.arguments)
    other_order = why_other_order(saved.shared.get("data", {}), run.loader.state_dict())
    problems = []
    if changes.refused and not run.checkpoints.config.allow_changed_arguments:
        problems.append(
            f"{saved.path} was saved with other arguments ({', '.join(changes.refused)}), so the run would not go on "
            "as it began: give those it was saved with, or --allow_changed_arguments."
        )
    if other_order and not run.loader.config.allow_changed_data_order:
        problems.append(
            f"{saved.path} was saved with {other_order}, so the data would come in another order: "
            "use the same values, or give --allow_changed_data_order."
        )
    if problems:
        raise ConfigError(" ".join(problems))
    return changes, "; ".join(
        [*changes.refused, *([f"{saved.path.name} was saved with {other_order}"] * bool(other_order))]
    )


def _position(run: Run, state: TrainState, saved: Saved) -> tuple[Mapping[str, int], bool]:
    """Where the data goes on, and whether in the very batches of the checkpoint."""
    position, now = saved.shared.get("data"), run.loader.state_dict()
    other_order = why_other_order(position or {}, now)
    if other_order:
        run.console.line(f"The data goes on in another order, {saved.path.name} was saved with {other_order}.")
    if position is None or other_order:  # a Trainer's counts optimizer steps
        accumulation = run.loader.config.gradient_accumulation_steps
        steps = at_step(state.global_step, updates_per_epoch=run.plan.updates_per_epoch, accumulation=accumulation)
        return steps, position is None
    if has_other_layout(position, now):
        run.console.line(
            "The same samples come in the same steps, in other batches: the numbers are equal up to rounding, "
            "as long as nothing is drawn at random (dropout, random collators)."
        )
        return converted(position, now), False
    return position, True


def _restore_optimizer(run: Run, saved: Saved) -> None:
    was, now = saved.shared.get("optim", run.optim.optim), run.optim.optim
    interchangeable = {"adamw_torch", "adamw_torch_fused"}
    if was != now and not {was, now} <= interchangeable:
        raise ConfigError(f"{saved.path} was saved with --optim {was}, not {now}: its state does not fit; give {was}.")
    was_stage, stage = (
        saved.shared.get("zero_stage", int((saved.path / LATEST_FILE).is_file())),
        zero_stage(run.accelerator),
    )
    if stage and saved.shared.get("world_size", run.accelerator.num_processes) != run.accelerator.num_processes:
        raise ConfigError(
            f"{saved.path} was saved by {saved.shared['world_size']} processes, and as many have to read the shards of "
            "DeepSpeed's: launch so many, or start from its weights with --model_name_or_path."
        )
    if was_stage != stage:
        raise ConfigError(
            f"{saved.path} was saved with {_described(was_stage)}, not {_described(stage)}: "
            "use the launch config that it was saved with."
        )
    try:
        if isinstance(run.stepper, ZeroStepper):
            load_shards(run.model, saved.path)
        elif is_fsdp(run.accelerator) or has_optimizer_shards(saved.path):
            _restore_from_shards(run, saved)
        else:
            run.optimizer.load_state_dict(saved.files["optimizer.pt"])
        run.scheduler.load_state_dict(saved.files["scheduler.pt"])
    except (ValueError, KeyError, RuntimeError) as error:
        reason = f"{saved.path} holds the state of another optimizer or schedule ({error})"
        raise ConfigError(f"{reason}; give the flags it was saved with.") from error


def _restore_from_shards(run: Run, saved: Saved) -> None:
    """Into shards, or from them, whatever the number of ranks then and now."""
    if has_optimizer_shards(saved.path):
        ranks = (run.accelerator.process_index, run.accelerator.num_processes)
        parts = read_optimizer(saved.path, ranks=ranks, is_sharded=is_fsdp(run.accelerator))
    else:
        parts = [saved.files["optimizer.pt"]]
    load_optimizer(run.optimizer, parts)


def _described(stage: int) -> str:
    return f"DeepSpeed ZeRO-{stage}" if stage else "no DeepSpeed"
