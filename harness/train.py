"""
The script: a table of contents. Builds, trains, closes.

`accelerate launch harness/train.py`, `python harness/train.py`, `python -m harness.train` and `harness-train` are
the same. Exit codes: 0 finished, 1 failed, 2 bad input or configuration, 85 preempted after a save, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Run as a script this folder would come first and its files shadow modules; its parent belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    from harness.held_signals import hold

    hold()  # before the imports below, which take seconds

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator

from harness.arguments import Config, parse
from harness.assemble import (
    Session,
    assemble,
    build_run,
    eval_set,
    eval_sets,
    prepare_for_evaluation,
    weights_dtype,
)
from harness.checkpoint import Found, check_output_dir, choose_output_dir, find, read, remove_leftovers
from harness.config import ConfigError
from harness.console import set_up_logging
from harness.debug import NonFiniteError, describe_batch, watch_training
from harness.export import is_sharded, save_model, whole_weights
from harness.inputs import bring_checkpoint, find_checkpoint
from harness.lock import Lock
from harness.loop import Run, fit
from harness.model_card import write_model_card
from harness.restoring import restore
from harness.saving import CheckpointError
from harness.slurm import FAILED, FINISHED, PREEMPTED, STOPPED, JobRecord, slurm_job
from harness.state import TRAINER_STATE_FILE, TrainState, update_json, write_json
from harness.stopping import PREEMPTED_FILE, StoppedError
from harness.topology import agree, build_accelerator, idle_accelerators, is_first_rank, settle, tell_all
from harness.tracking import rewrite, run_config, trackers
from harness.tracking.downloads import record_use
from harness.tracking.lifecycle import close_trackers, describe_trackers, open_trackers, wandb_tracker

logger = logging.getLogger("harness")
SECONDS_FOR_RANK_ZERO = 5.0
PREDICTIONS_FILE = "predict_results.txt"  # the name in Transformers' example scripts


def script() -> None:
    """The installed command."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code. Errors that are not the user's raise with their traceback."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        if config.run.print_config:
            sys.stdout.write(config.as_yaml())
            return 0
        run_command(config)
    except ConfigError as error:
        return _fail(2, str(error))
    except (CheckpointError, NonFiniteError) as error:
        return _fail(1, str(error))
    except torch.OutOfMemoryError as error:
        remedy = "use a smaller --per_device_train_batch_size, --activation_checkpointing, or --bf16"
        return _fail(1, f"Out of memory: {remedy}. ({str(error).splitlines()[0]})")
    except StoppedError as stopped:
        return _fail(stopped.exit_code, str(stopped))
    except KeyboardInterrupt:
        return _fail(130, "Interrupted.")
    return 0


def _fail(code: int, message: str) -> int:
    if is_first_rank():
        print(f"harness-train: {message}", file=sys.stderr, flush=True)
    elif code in (1, 2):
        # Ranks fail together, with one message. A launcher ends all when one has ended, and that has to be rank zero;
        # who is still here after it failed alone.
        time.sleep(SECONDS_FOR_RANK_ZERO)
        print(f"harness-train: {message} (not on rank zero)", file=sys.stderr, flush=True)
    return code


def run_command(config: Config) -> None:
    """Collective: everything that a command line asks for."""
    job = slurm_job()
    if job is not None and config.run.trains:
        config = replace(config, checkpoint=config.checkpoint.in_job(job))
    checkpoints_activations = config.modeling.checkpoints_activations
    accelerator = build_accelerator(config.topology, activation_checkpointing=checkpoints_activations)
    try:
        with Lock() as lock:
            run_on(accelerator, config, lock)
    except StoppedError:
        accelerator.wait_for_everyone()  # a launcher ends all when one has ended: rank zero is still closing
        raise
    finally:
        settle()
    accelerator.end_training()


def run_on(accelerator: Accelerator, config: Config, lock: Lock) -> None:
    """Collective: find, assemble, train, evaluate, show."""
    set_up_logging(config.console, is_main=accelerator.is_main_process, is_local_main=accelerator.is_local_main_process)
    if (idle := idle_accelerators(accelerator)) > 0:
        logger.warning("%d more accelerators are idle; to use them: accelerate launch --multi_gpu ...", idle)
    found, output_dir = tell_all(accelerator, lambda: locate(config, lock))
    record = JobRecord(output_dir, slurm_job() if config.run.trains and accelerator.is_main_process else None)
    stop_if_finished(accelerator, record)
    for reason in found.passed_over:
        logger.warning("Passed over %s.", reason)
    chosen = trackers(config.tracking, dir=str(output_dir), resumes=config.checkpoint.resumes)
    session = assemble(config, accelerator, output_dir, weights=found.path)
    state = TrainState()
    tracker = wandb_tracker(chosen)
    run = build_run(session, state, tracker) if config.run.trains else None
    if run is not None and found.path is not None:
        restore_together(run, state, found.path)
    tell_all(accelerator, lambda: begin_output(session, lock, record, from_step=state.global_step))
    if run is not None:
        run.checkpoints.lock = lock
    configuration = run_config(session.task.model, config.flat())
    open_trackers(accelerator, chosen, config.tracking.project, output_dir=output_dir, configuration=configuration)
    record_use(tracker.tracker, [*session.artifacts, *([found.artifact] if found.artifact else [])])
    exit_code, how = 1, FAILED
    rows: list[tuple[str, str]] = []
    try:
        results = train(session, run, state) if run is not None else {}
        results |= evaluate_and_predict(session, run, state)
        sample = make_sample(session)
        if accelerator.is_main_process:
            update_json(output_dir / "all_results.json", results)
            if sample:
                session.console.line(f"sample: {sample}")
            rows = describe_end(session, run, state, results)
        accelerator.wait_for_everyone()  # nobody waits for rank zero's last uploads
        exit_code, how = 0, FINISHED
    except StoppedError as stopped:
        exit_code, how = stopped.exit_code, PREEMPTED if stopped.was_preempted else STOPPED
        if accelerator.is_main_process and stopped.was_preempted:
            (output_dir / PREEMPTED_FILE).touch()
        raise
    finally:
        session.console.close()
        # A launcher ends all ranks when one has ended: how the run ended is told before that.
        with run.stop.listening() if run is not None and exit_code != 0 else nullcontext():
            is_shut_out = lock.is_lost()
            close_trackers(accelerator, exit_code=exit_code, is_shut_out=is_shut_out)
            if not is_shut_out:
                record.end(how)
        session.console.table(rows + describe_trackers(accelerator))  # after all that W&B says at its end


def stop_if_finished(accelerator: Accelerator, record: JobRecord) -> None:
    """Collective: raise StoppedError, with exit code 0, if an earlier life of this SLURM job has done all."""
    if tell_all(accelerator, record.says_finished):
        message = f"The training of this job is complete, there is nothing left to do: {record.path.parent}."
        raise StoppedError(message, exit_code=0, was_preempted=False)


def locate(config: Config, lock: Lock) -> tuple[Found, Path]:
    """
    Rank zero: the checkpoint to go on from, and the folder of the run. Raises ConfigError.

    Writes nothing but the lock, and that where something is: who still writes there must not while it is read. And a
    checkpoint that W&B has.
    """
    output_dir = choose_output_dir(config.checkpoint)
    artifact = find_checkpoint(config, output_dir)
    try:
        if artifact is not None:
            output_dir.mkdir(parents=True, exist_ok=True)
        if config.run.trains and config.checkpoint.resumes and output_dir.is_dir():
            lock.take(output_dir)
    except OSError as error:
        raise ConfigError(f"--output_dir={output_dir} can't be written to: {error}.") from error
    if artifact is None:
        found = find(config.checkpoint, output_dir)
    else:
        found = bring_checkpoint(config, artifact, output_dir, token=lock.token)
    check_output_dir(output_dir, may_hold_run=found.path is not None or not config.run.trains)
    return found, output_dir


def begin_output(session: Session, lock: Lock, record: JobRecord, *, from_step: int) -> None:
    """Rank zero: make the folder of the run and write the configuration into it: the first thing written."""
    try:
        session.output_dir.mkdir(parents=True, exist_ok=True)
        if session.config.run.trains:  # an evaluation alone leaves the trained run's as it is
            lock.take(session.output_dir)
            if left := remove_leftovers(session.output_dir):
                logger.info("Removed what saves that did not end have left: %s.", ", ".join(left))
            (session.output_dir / PREEMPTED_FILE).unlink(missing_ok=True)
            record.begin(from_step=from_step)
            (session.output_dir / "harness_config.yaml").write_text(session.config.as_yaml(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output_dir={session.output_dir} can't be written to: {error}.") from error


def restore_together(run: Run, state: TrainState, path: Path) -> None:
    """Collective: every rank restores, or none goes on. Raises ConfigError on all."""
    accelerator = run.accelerator
    failure: ConfigError | None = None
    try:
        ranks = (accelerator.process_index, accelerator.num_processes)
        restore(run, state, read(path, ranks=ranks, device=accelerator.device))
    except ConfigError as error:
        failure = error
    if (message := agree(accelerator, failure)) is not None:
        raise ConfigError(message) from failure
    run.console.line(f"Going on from {path}, step {state.global_step} of {run.plan.max_steps}.")


def train(session: Session, run: Run, state: TrainState) -> dict[str, float]:
    """Collective: the training, then the final model and state in the folder of the run."""
    console, config = session.console, session.config
    console.start(run.plan.max_steps, state.global_step, "step")
    if config.debug.is_on:
        console.line(describe_batch(run.loader.peek(), session.task.processing_class))
    run.tracker.watch(run.model, session.accelerator, log_freq=max(100, state.logging_steps))
    with run.stop.listening():
        try:
            with watch_training(config.debug, session.task.model, console.line), run.watchdog.watching():
                results = fit(run, state)
        finally:
            run.checkpoints.wait()  # whatever ends the training: what it was saving becomes whole
    console.close()
    weights = whole_weights(session.task.model)
    run.checkpoints.together(lambda: save_final(session, run, state, weights) if run.checkpoints.is_writer else None)
    run.checkpoints.check_last()
    return results


def save_final(session: Session, run: Run, state: TrainState, weights: Mapping[str, torch.Tensor]) -> None:
    """Rank zero: the model and the state that the training ended with."""
    model, output_dir, best = session.task.model, session.output_dir, run.best
    if run.checkpoints.lock is not None and run.checkpoints.lock.is_lost():
        raise CheckpointError(
            f"Another process has taken over {output_dir}: this one ends, its model is not put there."
        )
    files = save_model(model, session.task.processing_class, output_dir, as_published=True, weights=weights)
    write_json(output_dir / TRAINER_STATE_FILE, state.trainer_state(early_stopping=best.early_stopping))
    write_model_card(output_dir, session.config, state, badge=run.tracker.badge)
    metadata: dict[str, float] | None = None
    if best.config.load_best_model_at_end and state.best_metric is not None:
        # The names are the Trainer's, the misspelt one too.
        metric = best.config.metric_for_best_model or "loss"
        metadata = {f"eval/{metric}": state.best_metric, "train/total_floss": state.total_flos}
    run.tracker.log_model(files, metadata=metadata)


def evaluate_and_predict(session: Session, run: Run | None, state: TrainState) -> dict[str, float]:
    """Collective: what --do_eval and --do_predict ask for, after the training as in Transformers' example scripts."""
    asked = session.config.run
    if not (asked.do_eval or asked.do_predict):
        return {}
    accelerator, task = session.accelerator, session.task
    model = prepare_for_evaluation(session) if run is None else run.model
    if run is not None:
        run.optimizer.eval()
    if (dtype := weights_dtype(session.config)) is not None:
        if is_sharded(task.model):
            raise ConfigError("--bf16_full_eval and --fp16_full_eval can't be used with ZeRO-3; leave them out.")
        model = model.to(dtype)
    results: dict[str, float] = {}
    sets = [*(eval_sets(session) if asked.do_eval else ())]
    if asked.do_predict:
        sets.append(eval_set(session, task.test_dataset, "test"))
    keeps = task.describe_predictions is not None
    for data in sets:
        outcome = session.evaluator.run(model, data, keep_predictions=keeps and data.prefix == "test")
        session.console.evaluation(outcome.metrics, step=state.global_step)
        row = {**outcome.metrics, "epoch": state.epoch, **outcome.extras}
        accelerator.log(rewrite(row), step=state.global_step)
        results |= outcome.metrics
        if outcome.predictions is not None and task.describe_predictions and accelerator.is_main_process:
            lines = task.describe_predictions(outcome.predictions)
            (session.output_dir / PREDICTIONS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return results


def make_sample(session: Session) -> str:
    """Collective: a text from the trained model, on rank zero alone unless it takes all; "" if its task makes none."""
    task = session.task
    if task.sample is None or not session.config.run.trains:
        return ""
    takes_part = session.accelerator.is_main_process or is_sharded(task.model)
    return task.sample(task.model.eval()) if takes_part else ""


def describe_end(
    session: Session, run: Run | None, state: TrainState, results: dict[str, float]
) -> list[tuple[str, str]]:
    """Rank zero: what came out and where it is, as rows of a short table."""
    rows = []
    if state.best_metric is not None:
        best = f"{state.best_metric:.4f} at step {state.best_global_step or 'unknown'}"
        rows.append((f"best {session.config.best_metric}", best))
    if losses := [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]:
        rows.append(("last eval_loss", f"{losses[-1]:.4f} (first: {losses[0]:.4f})"))
    if "train_samples_per_second" in results:
        rate, seconds = results["train_samples_per_second"], results["train_runtime"]
        rows.append(("speed", f"{rate:.1f} samples/s, {seconds:.1f} s in all"))
    if run is not None:
        rows.append(("model", str(session.output_dir)))
        if session.config.plan.save_strategy != "no":
            rows.append(("checkpoints", f"{session.output_dir}/checkpoint-*"))
            rows.append(("", run.checkpoints.describe()))
    if session.config.run.do_predict and session.task.describe_predictions is not None:
        rows.append(("predictions", f"{session.output_dir}/{PREDICTIONS_FILE}"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
