"""
The content of a checkpoint, part by part: each part says what a save takes and what a resume does with it.

Only the weights are loaded elsewhere: into the model before it is wrapped.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from harness.checkpoint.find import list_checkpoints
from harness.checkpoint.fit import Asked, changes, check_arguments, check_optimizer
from harness.checkpoint.host_copies import emptied
from harness.checkpoint.layout import SCALER_FILE, SCHEDULER_FILE, Saved, read
from harness.checkpoint.rescue import Trial
from harness.checkpoint.schema import OF_A_SCHEDULE, check_ours
from harness.checkpoint.writer import Content
from harness.data.position import at_step, converted, describe_change, has_other_layout, why_other_order
from harness.distributed.accelerator import software
from harness.distributed.optimizer_shards import why_unlike
from harness.distributed.ranks import agree, ranks_of
from harness.errors import CheckpointError, ConfigError
from harness.flags import FLAGS
from harness.model.optim import flags_kept
from harness.model.weights import (
    check_published,
    config_kept,
    own_weights,
    raw_weights,
    save_model,
    save_processing,
    stand_ins,
    trained_bytes,
)
from harness.session import Run
from harness.training import rng
from harness.training.state import TRAINER_STATE_FILE, TrainState
from harness.training.watchdog import SAVE

logger = logging.getLogger(__name__)

TWO_AVERAGES = ("adamw_torch", "adamw_torch_fused")  # optimizers that keep two values of its type for each weight


def save(run: Run, state: TrainState) -> None:
    """Collective: copy the state for checkpoint-N; it is written while the training goes on."""
    run.watchdog.at(SAVE, state.global_step)
    run.checkpoints.settle()
    run.work.settle(state)
    state.num_skipped_steps += int(run.stepper.take_skipped())
    best, known = run.checkpoints.path_of(state.best_global_step or 0), state.best_model_checkpoint
    if state.best_global_step == state.global_step or best.is_dir():
        state.best_model_checkpoint = str(best)
    elif known is not None and not Path(known).is_dir():  # that checkpoint's save has failed
        state.best_model_checkpoint = None
    content = _taken_together(run, state)
    is_best = state.best_global_step == state.global_step
    log = run.tracker.checkpoint_logger(step=state.global_step, epoch=state.epoch, is_best=is_best)
    run.checkpoints.save(content, best=state.best_model_checkpoint, then=log)


def rehearse(run: Run, state: TrainState) -> None:
    """
    Collective: try, before the first step, to save what a checkpoint and the final model consist of.

    All is written but the bytes of tensors, and removed again. Raises ConfigError if a save would fail, or if the disk
    has no room for one.
    """
    model, failure, found = run.bare_model, None, None
    try:
        found = _without_bytes(run, state)
    except Exception as error:  # told to the other ranks, then raised
        failure = error
    message = agree(run.accelerator, failure)
    if message is not None or found is None:
        raise ConfigError(f"A checkpoint of this model can't be made, so no step is made: {message}") from failure
    content, num_bytes = found
    processing = type(run.processing_class).__name__
    trials = [
        Trial(f"The model {type(model).__name__}", lambda folder: content.write_model(folder, content.weights)),
        Trial(f"The model {type(model).__name__}, as it is published,", lambda _: check_published(model)),
        Trial(f"The {processing}", lambda folder: save_processing(run.processing_class, folder)),
        Trial("A checkpoint", lambda _: _check_room(run, state, num_bytes)),
    ]
    with config_kept(model):
        run.checkpoints.rehearse(content, trials, only_model=run.plan.config.save_strategy == "no")


def _without_bytes(run: Run, state: TrainState) -> tuple[Content, int]:
    """Local: return the content of a checkpoint without its tensors' bytes, and the size of the model in bytes."""
    model = run.bare_model
    weights, num_bytes = stand_ins(model)
    content = take(run, state)
    return replace(
        content,
        weights=weights,
        write_model=lambda folder, tensors: save_model(model, None, folder, as_published=False, weights=tensors),
        files=emptied(content.files),
        rank_files=emptied(dict(content.rank_files)),
        write_shards=None,
    ), num_bytes


def _check_room(run: Run, state: TrainState, model_bytes: int) -> None:
    """Rank zero: raise ConfigError if the disk has no room for one save; warn if it has none for all that are kept."""
    plan, config, folder = run.plan, run.checkpoints.config, run.checkpoints.output_dir
    saves = plan.config.save_strategy != "no"
    a_checkpoint = model_bytes
    if run.optim.optim in TWO_AVERAGES and not config.save_only_model:
        a_checkpoint += 2 * trained_bytes(run.bare_model)
    needed, usage = a_checkpoint if saves else model_bytes, shutil.disk_usage(folder)
    if usage.total == 0:  # a file system that does not say
        return
    if needed > usage.free:
        what = "a checkpoint takes" if saves else "the final model takes"
        raise ConfigError(
            f"{what} at least {needed:,} bytes, and {usage.free:,} are free in {folder}: make room, or take another "
            "--output_dir"
        )
    num_left = plan.num_saves(from_step=state.global_step)
    if config.save_total_limit is not None:  # older ones are deleted once the new one is there
        num_left = min(num_left, max(config.save_total_limit + 1 - len(list_checkpoints(folder)), 1))
    total = num_left * a_checkpoint + model_bytes
    if total > usage.free:
        logger.warning(
            "%d checkpoints of %.1f MB and the final model take %.1f MB, and %.1f MB are free in %s: give a smaller "
            "--save_total_limit or a greater --save_steps.",
            *(num_left, a_checkpoint / 1e6, total / 1e6, usage.free / 1e6, folder),
        )


def _taken_together(run: Run, state: TrainState) -> Content:
    """Collective: return the content of a checkpoint with whole weights; if a rank can't make it, leave the weights."""
    content, failure = None, None
    try:
        content = take(run, state)
    except Exception as error:  # told to the other ranks, then raised
        failure = error
    message = run.checkpoints.agree(failure)
    if content is not None and message is None:
        content.weights = run.backend.whole(content.weights)
        return content
    left = run.checkpoints.leave(run.backend.whole(raw_weights(run.bare_model)), step=state.global_step)
    if failure is None:
        raise CheckpointError(f"checkpoint-{state.global_step} could not be made: {message}.")
    if left:
        logger.error("%s", left)
    raise failure


def take(run: Run, state: TrainState) -> Content:
    """
    Local: return the content of a checkpoint of this step.

    Tensors are the training's own, the weights as this rank has them.
    """
    model = run.bare_model
    content = Content(
        step=state.global_step,
        weights=own_weights(model),
        are_copies=run.backend.is_sharded,
        write_model=lambda folder, weights: save_model(
            model, run.processing_class, folder, as_published=False, weights=weights
        ),
    )
    for part in parts(run, state):
        part.save(content)
    return content


def restore(run: Run, state: TrainState, path: Path) -> None:
    """
    Collective: load a checkpoint, ours or a Trainer's, into a run that has its weights already.

    Raises ConfigError, on all ranks, for one that does not fit.
    """
    found: list[Saved] = []
    _together(run, lambda: found.append(_read(run, path)))  # before ranks load together, which one can't do without all
    _together(run, lambda: _load(run, state, found[0]))
    run.console.line(f"Going on from {path}, step {state.global_step} of {run.plan.max_steps}.")


def _together(run: Run, act: Callable[[], object]) -> None:
    """Collective: do it on all ranks. Raises ConfigError on all if one of them raised it."""
    failure: ConfigError | None = None
    try:
        act()
    except ConfigError as error:
        failure = error
    if (message := agree(run.accelerator, failure)) is not None:
        raise ConfigError(message) from failure


def _read(run: Run, path: Path) -> Saved:
    try:
        saved = read(path, ranks=ranks_of(run.accelerator))
        if saved.shared:
            check_ours(saved.shared, saved.other_ranks or [saved.rank_state])
        return saved
    except ConfigError as error:
        raise ConfigError(f"--resume_from_checkpoint: {path}: {error}") from error


def _load(run: Run, state: TrainState, saved: Saved) -> None:
    """Local, but for ZeRO's shards. Raises ConfigError for a value that no check has met and that can't be loaded."""
    for part in parts(run, state):
        try:
            part.load(saved)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
            what = type(part).__name__.lower()
            raise ConfigError(f"{saved.path} can't be loaded ({what}): {type(error).__name__} {error}") from error


class Part(Protocol):
    """A part of a checkpoint. It loads what it has saved, and does without what a Trainer or an older version lacks."""

    def save(self, content: Content) -> None:
        """Local: put this part into the content."""
        ...

    def load(self, saved: Saved) -> None:
        """Local: put back what was saved; ZeRO's optimizer is collective. Raises ConfigError if it does not fit."""
        ...


def parts(run: Run, state: TrainState) -> tuple[Part, ...]:
    """Return all parts in the order of loading: the position in the data follows from the counters."""
    return (
        Counters(run, state),
        Optimizer(run),
        Scaler(run),
        Software(),
        Arguments(run),
        Tracking(run),
        Data(run, state),
        LossScaling(run),
        MicroBatches(run),
        LossWindow(run),
    )


@dataclass(frozen=True)
class Counters:
    """The Trainer's state and history, and the counters of ours that trainer_state.json has no place for."""

    run: Run
    state: TrainState

    def save(self, content: Content) -> None:
        """Save into trainer_state.json, and as `state` into harness_state.json."""
        content.trainer_state = self.state.trainer_state(early_stopping=self.run.best.early_stopping)
        content.shared["state"] = self.state.state_dict()

    def load(self, saved: Saved) -> None:
        """Load both; check patience and the best checkpoint again: flags may differ, the folder may have moved."""
        state = self.state
        state.load_trainer_state(saved.path / TRAINER_STATE_FILE)
        state.load_state_dict(saved.shared.get("state", {}))
        patience = self.run.best.config.early_stopping_patience
        state.should_stop = patience is not None and state.early_stopping_patience_counter >= patience
        best = state.best_model_checkpoint
        if best is not None and not Path(best).is_dir():  # the run was moved, or came from W&B
            beside = saved.path.with_name(Path(best).name)
            state.best_model_checkpoint = str(beside) if beside.is_dir() else None
            if not beside.is_dir():
                logger.warning("The best checkpoint %s is gone; it can't be loaded at the end.", best)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer, in the files of its backend, and its schedule."""

    run: Run

    def save(self, content: Content) -> None:
        """Save into the Trainer's files, with FSDP2 one file a rank, with DeepSpeed its shards."""
        run = self.run
        found = run.backend.save_optimizer(run.model, run.optimizer, step=content.step)
        content.files |= {SCHEDULER_FILE: run.scheduler.state_dict(), **found.files}
        content.rank_files, content.write_shards = found.rank_files, found.write_shards
        content.shared |= {"optim": run.optimizer_name, "zero_stage": run.backend.zero_stage}

    def load(self, saved: Saved) -> None:
        """Load the state. Raises ConfigError for another --optim or another stage of ZeRO."""
        run = self.run
        check_optimizer(saved.path, saved.shared, _asked(run))
        try:
            own = run.scheduler.state_dict()
            # Not the attributes of its functions: those of another --lr_scheduler_type are none of this one's.
            schedule = {**saved.files[SCHEDULER_FILE], **{name: own[name] for name in own if name == "lr_lambdas"}}
            if missing := [name for name in OF_A_SCHEDULE if name in own and name not in schedule]:
                raise ValueError(f"{SCHEDULER_FILE} has no {missing[0]}")
            if (fault := why_unlike(own, schedule)) is not None:
                raise ValueError(f"{SCHEDULER_FILE} holds {fault}")
            with flags_kept(run.optimizer, run.scheduler, run.checkpoints.config.change_on_resume or []):
                run.backend.load_optimizer(run.model, run.optimizer, saved.path, saved.files)
                # A schedule takes every name for an attribute of its own.
                run.scheduler.load_state_dict({name: value for name, value in schedule.items() if name in own})
        except (ValueError, KeyError, RuntimeError) as error:
            reason = f"{saved.path} holds the state of another optimizer or schedule ({error})"
            raise ConfigError(f"{reason}; give the flags it was saved with.") from error


@dataclass(frozen=True)
class Scaler:
    """The loss scale of fp16, which Accelerate keeps."""

    run: Run

    def save(self, content: Content) -> None:
        """Save into the Trainer's file."""
        if self.run.accelerator.scaler is not None:
            content.files[SCALER_FILE] = self.run.accelerator.scaler.state_dict()

    def load(self, saved: Saved) -> None:
        """Load it, if both the checkpoint and this run have one."""
        if self.run.accelerator.scaler is not None and SCALER_FILE in saved.files:
            self.run.accelerator.scaler.load_state_dict(saved.files[SCALER_FILE])


class Software:
    """The versions that the last bits of a number depend on."""

    def save(self, content: Content) -> None:
        """Save into harness_state.json."""
        content.shared["software"] = software()

    def load(self, saved: Saved) -> None:
        """Warn if they differ."""
        if change := describe_change(saved.shared.get("software", {}), software()):
            logger.warning("%s was saved with %s: numbers may differ in their last bits.", saved.path, change)


@dataclass(frozen=True)
class Arguments:
    """The arguments of the run."""

    run: Run

    def save(self, content: Content) -> None:
        """Save into harness_state.json."""
        content.shared["arguments"] = self.run.arguments

    def load(self, saved: Saved) -> None:
        """Print what differs. Raises one ConfigError for all that is not allowed, the order of the data included."""
        run, asked = self.run, _asked(self.run)
        check_arguments(saved.path, saved.shared, asked, FLAGS)
        found, _ = changes(saved.shared, asked, FLAGS)
        if found.told:
            run.console.line(f"Other arguments than those of {saved.path.name}: {', '.join(found.told)}.")


def _asked(run: Run) -> Asked:
    return Asked(
        arguments=run.arguments,
        loader=run.loader,
        config=run.checkpoints.config,
        optimizer=run.optimizer_name,
        zero_stage=run.backend.zero_stage,
    )


@dataclass(frozen=True)
class Tracking:
    """The number of rows that the run has, in W&B and in its journal."""

    run: Run

    def save(self, content: Content) -> None:
        """Save into harness_state.json, with a copy of the journal."""
        content.shared["tracking"] = self.run.tracker.state_dict()
        content.others = self.run.tracker.files_of_checkpoint()

    def load(self, saved: Saved) -> None:
        """Load it, with the changes that alter numbers: after one, later rows are not written again as they were."""
        found, other_order = changes(saved.shared, _asked(self.run), FLAGS)
        told = [*found.refused, *([f"{saved.path.name} was saved with {other_order}"] if other_order else [])]
        self.run.tracker.load_state_dict(saved.shared.get("tracking", {}), saved.path, changes="; ".join(told))


@dataclass(frozen=True)
class Data:
    """The position in the data, and the random generators that belong to it."""

    run: Run
    state: TrainState

    def save(self, content: Content) -> None:
        """Save into harness_state.json; the generators into the Trainer's file of each rank, beside our own values."""
        content.shared["data"] = self.run.loader.state_dict()
        accelerator = self.run.accelerator
        content.rank_state |= rng.capture(accelerator.device, world_size=accelerator.num_processes)
        ours = content.rank_state.setdefault("harness", {})
        ours["data"] = self.run.loader.rng_state_dict()
        if own := rng.capture_own(accelerator.device):
            ours["own"] = own

    def load(self, saved: Saved) -> None:
        """Go on at the same batches if their size and number are equal, else at the same samples."""
        run, (position, is_exact) = self.run, self._position(saved)
        if saved.rank_state is None:
            logger.warning("%s has no random state for this rank: the run goes on, but not to the bit.", saved.path)
            run.loader.load_position(position)
        else:
            # With another layout the batch that was drawn ahead is a different one.
            ahead = saved.ours.get("data", {}) if is_exact else {}
            run.loader.load_state_dict(position, ahead, {**saved.rank_state, "own": saved.ours.get("own", {})})
        if reason := run.loader.why_read_again:
            count = run.loader.batches_drawn
            run.console.line(f"The stream is read again up to its position, {count} batches of a rank: {reason}.")

    def _position(self, saved: Saved) -> tuple[Mapping[str, int], bool]:
        """Return where the data goes on, and whether at exactly the batches of the checkpoint."""
        run, position, now = self.run, saved.shared.get("data"), self.run.loader.state_dict()
        other_order = why_other_order(position or {}, now)
        if other_order:
            run.console.line(f"The data goes on in another order, {saved.path.name} was saved with {other_order}.")
        if position is None or other_order:  # as in a Trainer's checkpoint: from the count of optimizer steps
            updates, accumulation = run.plan.updates_per_epoch, run.loader.config.gradient_accumulation_steps
            steps = at_step(self.state.global_step, updates_per_epoch=updates, accumulation=accumulation)
            return steps, position is None
        if has_other_layout(position, now):
            run.console.line(
                "The same samples come in the same steps, in other batches: the numbers are equal up to rounding, "
                "as long as nothing is drawn at random (dropout, random collators)."
            )
            return converted(position, now), False
        return position, True


@dataclass(frozen=True)
class LossScaling:
    """What was learned of the model's loss."""

    run: Run

    def save(self, content: Content) -> None:
        """Save into harness_state.json."""
        content.shared["loss"] = self.run.loss.state_dict()

    def load(self, saved: Saved) -> None:
        """Load it, so that nothing is learned again; what a Trainer or an older version lacks is learned."""
        self.run.loss.load_state_dict(saved.shared.get("loss", {}))


@dataclass(frozen=True)
class MicroBatches:
    """How far micro-batches are split since memory ran out."""

    run: Run

    def save(self, content: Content) -> None:
        """Save into harness_state.json, if they are."""
        if split := self.run.splitting.state_dict():
            content.shared["splitting"] = split

    def load(self, saved: Saved) -> None:
        """Load it: the first step begins with what has fitted."""
        self.run.splitting.load_state_dict(saved.shared.get("splitting", {}))


@dataclass(frozen=True)
class LossWindow:
    """The losses that no report has shown yet."""

    run: Run

    def save(self, content: Content) -> None:
        """Save into each rank's own file, beside the generators."""
        content.rank_state.setdefault("harness", {})["window"] = self.run.window.state_dict()

    def load(self, saved: Saved) -> None:
        """Load this rank's losses, or the mean of all ranks' if their number differs; a Trainer saves none."""
        if "window" not in saved.ours:
            return
        if saved.other_ranks:
            self.run.window.load_state_dicts([other["harness"]["window"] for other in saved.other_ranks])
        else:
            self.run.window.load_state_dict(saved.ours["window"])
