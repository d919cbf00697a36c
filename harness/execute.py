"""
Run a parsed command line: find the checkpoint, build the run, train, evaluate, show the results.

This module has all the slow imports, so that `harness.train` can parse and refuse a command line without them.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from harness.agent import sweep_run
from harness.build import Planned, assemble, build_run, plan_run
from harness.checkpoint.find import check_output_dir, in_job, in_sweep, list_checkpoints, remove_leftovers
from harness.checkpoint.fit import check_fit
from harness.checkpoint.lock import Lock
from harness.checkpoint.manifest import manifest_of
from harness.config import together
from harness.distributed.accelerator import build_accelerator, check_compile_backend, choose_backend
from harness.distributed.devices import check_cublas, describe_idle
from harness.distributed.process import process_kept
from harness.distributed.ranks import close_group, settle, tell_all
from harness.errors import ConfigError, StoppedError
from harness.flags import FLAGS, Config
from harness.loop import fit, is_over
from harness.model import optim
from harness.model.adapters import describe
from harness.model.weights import check_weights, load_weights, own_weights, raw_weights
from harness.results import Result, conclude, save_final
from harness.resume import Beginning
from harness.session import Run, Session
from harness.signals import INTERRUPTED_EXIT_CODE, PREEMPTED_FILE
from harness.slurm import FAILED, FINISHED, PREEMPTED, STOPPED, JobRecord, slurm_job
from harness.snapshot import rehearse, restore
from harness.tasks import Builder
from harness.tracking import WandbTracker, run_config, trackers
from harness.tracking.artifacts.download import record_use
from harness.tracking.folders import expand_folders
from harness.tracking.lifecycle import (
    close_trackers,
    describe_links,
    describe_trackers,
    local_tracker,
    open_trackers,
    wandb_tracker,
)
from harness.tracking.lineage import artifacts_of
from harness.tracking.media.due import last_evaluation
from harness.tracking.outlook import outlook
from harness.tracking.run.terminal import terminal_kept
from harness.training import rng
from harness.training.console import logging_kept, set_up_logging
from harness.training.debug import describe_batch, watch_training
from harness.training.state import TrainState
from harness.training.stopping import COMPLETES, StopReason, resume_flags, stopped

logger = logging.getLogger("harness")

CLOSING = "the training has ended, which is being recorded"


def check_names(config: Config) -> None:
    """Raise one ConfigError for all names of optimizers, schedules, backends and trackers that are unknown."""
    together(
        [
            lambda: optim.check_names(config.optim),
            lambda: check_compile_backend(config.topology),
            config.tracking.check_trackers,
        ]
    )


def run_command(config: Config, builder: Builder | None = None) -> Result:
    """
    Collective: do everything that a command line asks for; the process is afterwards as it was.

    A `builder` takes the place of the one that --task names.
    """
    check_names(config)
    expand_folders()
    job, sweep = slurm_job(), sweep_run()
    if sweep is not None and config.run.trains:
        config = replace(config, checkpoint=in_sweep(config.checkpoint, sweep))
    if job is not None and config.run.trains:
        config = replace(config, checkpoint=in_job(config.checkpoint, job))
    if config.topology.full_determinism and not config.topology.use_cpu:
        check_cublas()
    with process_kept(), rng.kept(), logging_kept(), terminal_kept() if config.tracking.uses_wandb else nullcontext():
        return _run(config, builder)


def _run(config: Config, builder: Builder | None) -> Result:
    try:
        checkpoints_activations = config.modeling.checkpoints_activations
        accelerator = build_accelerator(config.topology, activation_checkpointing=checkpoints_activations)
        try:
            with Lock() as lock:
                result = run_on(accelerator, config, lock, builder)
        except StoppedError:
            accelerator.wait_for_everyone()  # a launcher kills all ranks when one exits, and rank zero is still closing
            close_group(together=True)
            raise
    except BaseException:
        close_group(together=False)
        raise
    settle()
    accelerator.end_training()
    return result


def run_on(accelerator: Accelerator, config: Config, lock: Lock, builder: Builder | None = None) -> Result:
    """Collective: find the checkpoint, build the run, train, evaluate, show the results."""
    backend = choose_backend(accelerator)
    set_up_logging(config.console, is_main=accelerator.is_main_process, is_local_main=accelerator.is_local_main_process)
    if (idle := describe_idle(accelerator)) is not None:
        logger.warning("%s", idle)
    beginning = Beginning(config, lock)
    while not tell_all(accelerator, beginning.is_free):
        pass
    found, output_dir = tell_all(accelerator, beginning.look)
    record = JobRecord(output_dir, slurm_job() if config.run.trains and accelerator.is_main_process else None)
    stop_if_finished(accelerator, record)
    for reason in found.passed_over:
        logger.warning("Passed over %s.", reason)
    if (sweep := sweep_run()) is not None and sweep.is_given_again and config.run.trains and not found.is_there:
        logger.warning("W&B gives the run %s out again, but there is no checkpoint in %s.", sweep.run_id, output_dir)
    # Absolute: a wandb-core that an earlier run of this process has started may have another working directory.
    chosen = trackers(config.tracking, dir=str(output_dir.absolute()), resumes=config.checkpoint.resumes)
    session = assemble(config, backend, output_dir, is_resumed=found.is_there, builder=builder)
    state = TrainState()
    planned = plan_run(session, manifest_at(found.path)) if config.run.trains else None
    found = tell_all(accelerator, lambda: beginning.claim(accepts=lambda path: _accept(path, session, planned)))
    if found.path is not None:
        load_weights(session.task.model, found.path)
    if config.run.trains and not config.tracking.uses_wandb:
        chosen = [local_tracker(output_dir, resumes=found.path is not None), *chosen]
    tracker = wandb_tracker(chosen)
    saved = manifest_at(found.path)
    run = build_run(session, planned, state, tracker, saved) if planned is not None else None
    if run is not None and found.path is not None:
        restore(run, state, found.path)
    is_new = found.path is None
    tell_all(accelerator, lambda: begin_output(session, lock, record, from_step=state.global_step, is_new=is_new))
    if run is not None:
        run.checkpoints.lock = lock
    configuration = run_config(session.task.model, config.flat())
    if run is not None:
        rehearse(run, state)
    open_trackers(accelerator, chosen, config.tracking.project, output_dir=output_dir, configuration=configuration)
    session.console.table(describe_links(accelerator))
    used = [*session.artifacts, *([found.artifact] if found.artifact else [])]
    record_use(tracker.tracker, [*used, *artifacts_of(output_dir, config.tracking)])
    return carry_out(session, run, state, tracker, lock, record)


def carry_out(
    session: Session, run: Run | None, state: TrainState, tracker: WandbTracker, lock: Lock, record: JobRecord
) -> Result:
    """Collective: train, evaluate, show the results, and close what is open, however it ends."""
    accelerator, output_dir = session.accelerator, session.output_dir
    exit_code, how, is_trained = 1, FAILED, False
    rows: list[tuple[str, str]] = []
    try:
        trained = train(session, run, state) if run is not None else {}
        is_trained = run is not None
        metrics, rows = conclude(session, run, state, trained)
        found = (tracker.run_id, tracker.run_url)
        accelerator.wait_for_everyone()  # no other rank waits for rank zero's last uploads
        exit_code, how = 0, FINISHED
    except StoppedError as stopped:
        exit_code, how = stopped.exit_code, PREEMPTED if stopped.was_preempted else STOPPED
        if stopped.pruned_at is not None:
            tracker.summarize({"sweep/pruned_at_step": stopped.pruned_at})
        if accelerator.is_main_process and stopped.was_preempted:
            (output_dir / PREEMPTED_FILE).touch()
        raise
    except KeyboardInterrupt:
        exit_code, how = INTERRUPTED_EXIT_CODE, STOPPED
        left = what_is_left(session, run, state, is_trained=is_trained)
        raise KeyboardInterrupt(str(left)) from left
    finally:
        session.console.close()
        # The caller's model again: mixed precision has wrapped its forward.
        model = accelerator.unwrap_model(session.task.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        # A launcher kills all ranks when one exits: the end of the run is recorded before that.
        with run.stop.listening(CLOSING) if run is not None and exit_code != 0 else nullcontext():
            is_shut_out = lock.is_lost()
            is_at_once = run is not None and run.stop.is_at_once
            close_trackers(accelerator, exit_code=exit_code, leaves_open=is_shut_out or is_at_once)
            if not is_shut_out:
                record.end(how)
        rows.append(("folder", str(output_dir)))  # the only place that names it, however the run ended
        session.console.table(rows + describe_trackers(accelerator))  # after W&B's closing messages
    return Result(metrics=metrics, model=model, output_dir=output_dir, run_id=found[0], run_url=found[1], state=state)


def manifest_at(path: Path | None) -> dict[str, Any]:
    """Return the manifest of a checkpoint; {} without one."""
    return {} if path is None else manifest_of(path)


def stop_if_finished(accelerator: Accelerator, record: JobRecord) -> None:
    """Collective: raise StoppedError, with exit code 0, if an earlier attempt of this job has finished the training."""
    if tell_all(accelerator, record.says_finished):
        message = f"The training of this job is complete, there is nothing left to do: {record.path.parent}."
        raise StoppedError(message, exit_code=0, was_preempted=False)


def _accept(path: Path, session: Session, planned: Planned | None) -> None:
    """Raise ConfigError if the model, or a training as it is asked for, can't go on from the checkpoint."""
    check_weights(session.task.model, path)
    if planned is not None:
        check_fit(path, manifest_of(path), planned.asked, FLAGS)


def begin_output(session: Session, lock: Lock, record: JobRecord, *, from_step: int, is_new: bool) -> None:
    """Rank zero: make the folder of the run and write the configuration into it, before anything else is written."""
    try:
        session.output_dir.mkdir(parents=True, exist_ok=True)
        if session.config.run.trains:  # an evaluation alone keeps the file of the training
            lock.take(session.output_dir)
            if is_new:  # the folder may be another's by now
                check_output_dir(session.output_dir, may_hold_run=False)
            if left := remove_leftovers(session.output_dir):
                logger.info("Removed the leftovers of unfinished saves: %s.", ", ".join(left))
            (session.output_dir / PREEMPTED_FILE).unlink(missing_ok=True)
            record.begin(from_step=from_step)
            (session.output_dir / "harness_config.yaml").write_text(session.config.as_yaml(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output_dir={session.output_dir} can't be written to: {error}.") from error


def train(session: Session, run: Run, state: TrainState) -> dict[str, float]:
    """Collective: train, then save the final model and state; returns the metrics of the training."""
    console, config = session.console, session.config
    if run.stop.is_at(state.global_step) and not is_over(run, state):
        where, last = f"step {state.global_step} of {run.plan.max_steps}", run.plan.max_steps
        raise stopped(StopReason.AT_STEP, at=where, saved_in=session.output_dir, until=last)
    with run.stop.listening():  # before workers of the data are forked, which get a terminal's signals too
        console.start(run.plan.max_steps, state.global_step, "step")
        if adapter := describe(session.task.model):
            console.line(adapter)
        for line in outlook(
            run.tracker.config,
            run.plan,
            from_step=state.global_step,
            evaluated=last_evaluation(state.log_history),
            is_offline=run.tracker.run_url is None,
        ):
            console.line(line)
        if config.debug.is_on:
            console.line(describe_batch(run.loader.peek(), session.task.processing_class))
        run.tracker.watch(run.model, session.accelerator, log_freq=max(100, state.logging_steps))
        try:
            with (
                watch_training(config.debug, session.task.model, session.accelerator.device, console.line),
                run.watchdog.watching(),
            ):
                results = fit(run, state)
        except Exception:
            leave_trained(session, run, state)
            raise
        finally:
            if not run.stop.is_at_once:
                run.checkpoints.wait()  # however the training ends, the save under way is completed
        console.close()
        run.stop.promise = COMPLETES
        finish_output(session, run, state)
        run.checkpoints.check_last()
        if run.stop.was_interrupted():
            run.tracker.mark_preempting()
            raise what_is_left(session, run, state, is_trained=True)
    return results


def what_is_left(session: Session, run: Run | None, state: TrainState, *, is_trained: bool) -> StoppedError:
    """Local: return the error that says what there is after Ctrl-C that has not made a save."""
    reason, flags = "Interrupted", tuple[str, ...]()
    if is_trained:
        reason = f"Interrupted after the last step: the training is complete, its model is in {session.output_dir}"
    elif run is not None:
        found = list_checkpoints(session.output_dir)[-1:]
        kept = f"what is after {found[0].name} is not saved" if found else "there is no checkpoint"
        reason = f"Interrupted twice at step {state.global_step} of {run.plan.max_steps}: {kept}"
        flags = resume_flags(session.output_dir) if found else ()
    return StoppedError(reason, flags=flags, exit_code=INTERRUPTED_EXIT_CODE, was_preempted=False)


def leave_trained(session: Session, run: Run, state: TrainState) -> None:
    """
    Local: after an error when all steps are made, an evaluation's say, leave the weights, if no checkpoint has them.

    Sharded weights would take all ranks, and the error may be of one alone.
    """
    run.checkpoints.wait()
    is_saved = run.checkpoints.path_of(state.global_step).is_dir()
    if is_over(run, state) and not is_saved and not session.backend.is_sharded:
        weights = session.backend.whole(raw_weights(session.task.model))
        if left := run.checkpoints.leave(weights, step=state.global_step):
            logger.error("%s", left)


def finish_output(session: Session, run: Run, state: TrainState) -> None:
    """Collective: save the final model; if that fails leave its weights as they are, and raise on all ranks."""
    model, failure, own = session.task.model, None, {}
    try:
        own = own_weights(model)
    except Exception as error:  # raised once all ranks know of it
        failure = error
    if run.checkpoints.agree(failure) is not None:
        own = raw_weights(model)
    weights = session.backend.whole(own)

    def save() -> None:
        if failure is not None:
            raise failure
        if run.checkpoints.is_writer:
            save_final(session, run, state, weights)

    run.checkpoints.together(save, weights=weights, step=state.global_step)
