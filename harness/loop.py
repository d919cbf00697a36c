"""The training loop: `fit` reads from top to bottom and is the whole training."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

from accelerate.utils.memory import clear_device_cache

from harness.data.loader import Batch, step_groups
from harness.distributed.transfer import gather_numbers
from harness.errors import CheckpointError
from harness.fitting.splitting import Part
from harness.model.flags import BY_METRIC
from harness.model.optim import current_learning_rate
from harness.results import take_best
from harness.session import Run
from harness.snapshot import save
from harness.tracking import rewrite
from harness.tracking.media.due import last_evaluation
from harness.training.plan import Due
from harness.training.state import TrainState
from harness.training.stopping import StopReason, stopped
from harness.training.throughput import as_text
from harness.training.watchdog import END, EVALUATION, REPORT

logger = logging.getLogger(__name__)


def fit(run: Run, state: TrainState) -> dict[str, float]:
    """Collective: train from the step of `state` to the end of the plan; returns the metrics of the training."""
    run.clock.begin(state)
    if run.plan.config.eval_on_start and state.global_step == 0:
        evaluate(run, state, at_start=True)
    run.model.train()
    run.throughput.begin()
    for epoch in epochs_left(run, state):
        for window in steps_left(run, state, epoch):
            train_step(run, state, window)
            state.global_step += 1
            state.epoch = epoch + run.loader.batches_drawn / run.plan.batches_per_epoch
            run.console.advance(state.global_step)
            due = run.plan.at_step(state)
            follow(run, state, due, values=after_step(run, state, due, window))
            heed_stop(run, state)
        if run.loader.batches_drawn == 0:
            run.console.line(f"The stream has ended at step {state.global_step} of {run.plan.max_steps}.")
            break
        run.loader.finish_epoch()
        follow(run, state, run.plan.at_epoch_end(state), ends_epoch=True)
    return finish(run, state)


def is_over(run: Run, state: TrainState) -> bool:
    """Whether the planned steps are done or early stopping has ended the training."""
    return state.should_stop or state.global_step >= run.plan.max_steps


def epochs_left(run: Run, state: TrainState) -> Iterator[int]:
    """Yield the epochs to train, until the training is over and the work at the end of its last epoch is done."""
    for epoch in range(run.loader.epoch_index, run.plan.num_train_epochs):
        if state.is_ended and is_over(run, state):  # now, or already in the checkpoint that was resumed
            return
        yield epoch


def steps_left(run: Run, state: TrainState, epoch: int) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each optimizer step in the rest of an epoch, until the training is over."""
    windows = step_groups(run.loader.epoch(epoch), run.loader.config.gradient_accumulation_steps)
    for window in run.watchdog.drawn(run.throughput.drawn(windows), state):
        if not is_over(run, state):  # it may be over at once, if the checkpoint is of the last step
            yield window
        if is_over(run, state):
            return


def train_step(run: Run, state: TrainState, window: list[Batch]) -> None:
    """Collective: make one optimizer step over its micro-batches, without a host sync."""
    run.optimizer.train()
    shares = run.loss.shares(run.model, window)
    for attempt in run.splitting.attempts(window, shares, step=state.global_step + 1):  # one, unless memory runs out
        with attempt as parts:
            accumulate(run, state, parts)
    for batch, share in zip(window, shares, strict=True):
        run.work.add(batch)
        run.throughput.add(batch, targets=share.targets)
    run.tracker.observe(state.global_step + 1, scaler=run.accelerator.scaler)
    norm = run.stepper.step(run.modeling.max_grad_norm)
    rate = current_learning_rate(run.scheduler, run.optimizer, run.optim)
    run.window.end_step(norm, learning_rate=rate, nonfinite=run.nonfinite)
    if run.optim.lr_scheduler_type not in BY_METRIC and not run.stepper.was_skipped:
        run.scheduler.step()
    run.stepper.zero_grad()
    if run.modeling.torch_empty_cache_steps and state.global_step % run.modeling.torch_empty_cache_steps == 0:
        clear_device_cache()


def accumulate(run: Run, state: TrainState, parts: Sequence[Part]) -> None:
    """Collective: forward and backward of a step's micro-batches, each with its share; the last reduces gradients."""
    for i, (batch, share) in enumerate(parts, start=1):
        with run.stepper.micro_batch(is_last=i == len(parts)):
            loss, outputs = run.loss(run.model, batch, share)
            if run.window.outputs:
                run.window.add_outputs(outputs, part=share.part)
            run.stepper.backward(loss)
        run.window.add(loss.detach(), steps_since_report=state.global_step - state.last_logged_step)


def after_step(run: Run, state: TrainState, due: Due, window: Sequence[Batch]) -> dict[str, float]:
    """Collective: return the values that the task's after_step has for this step, if there is one."""
    if run.hooks.after_step is None:
        return {}
    ends_epoch = run.loader.remaining == 0 or is_over(run, state)
    log_due = due.log or (ends_epoch and run.plan.config.logging_strategy == "epoch")
    return run.hooks.values_of_step(run.view(state, log_due=log_due, batches=tuple(window)))


def follow(
    run: Run, state: TrainState, due: Due, *, values: Mapping[str, float] | None = None, ends_epoch: bool = False
) -> None:
    """
    Collective: log, evaluate and save, as far as each is due, in the order of Trainer._maybe_log_save_evaluate.

    `values` of the task's own go into the report, or else into a row of their own, as Trainer.log makes it.
    """
    if due.log and state.global_step > state.last_logged_step:
        report(run, state, values or {})
    elif values:
        run.console.report(emit(run, state, values, {}), step=state.global_step, rate=None)
    with run.throughput.paused() if due.evaluate or due.save or due.generate else nullcontext():
        is_best = evaluate(run, state) if due.evaluate else False
        if run.texts is not None and (due.generate or due.evaluate):
            run.watchdog.at(EVALUATION, state.global_step)
            run.texts.show(run.bare_model, step=state.global_step, completes=due.generate, draws=due.evaluate)
        state.is_ended = ends_epoch and is_over(run, state)  # a save from here on records it
        if (is_best if run.plan.config.save_strategy == "best" else due.save) and run.nonfinite.may_save(state):
            save(run, state)


def report(run: Run, state: TrainState, own: Mapping[str, float]) -> None:
    """
    Collective: report the steps since the last report. Only here a step waits for the device, and only once.

    `own` are the task's values for this step. One that only trackers are to have goes into `extras`, as train/NAME.
    """
    run.watchdog.at(REPORT, state.global_step)
    values = {**run.window.values(), **run.work.values(), **run.throughput.values(), **run.nonfinite.values()}
    of_ranks = gather_numbers(run.accelerator, {**values, "skipped": run.stepper.take_skipped()})
    steps = state.global_step - state.last_logged_step
    outputs = run.window.mean_outputs(of_ranks, num_steps=steps)
    total, num_nonfinite = run.window.drain(of_ranks)
    run.nonfinite.add_to(state, of_ranks)
    rates = run.throughput.report(of_ranks)
    logs = {"loss": total / steps, **run.window.last_step(), **outputs, **own}
    state.total_loss += total
    state.last_logged_step = state.global_step
    run.work.add_to(state, of_ranks)
    extras = ({"train/num_nonfinite_losses": num_nonfinite} if num_nonfinite else {}) | rates
    if run.stepper.scales_loss:
        state.num_skipped_steps += int(of_ranks[run.accelerator.process_index]["skipped"])
        extras["train/num_skipped_steps"] = state.num_skipped_steps
    logs = emit(run, state, logs, extras, timed=True)
    shown = {**logs, "loss": math.nan} if num_nonfinite else logs  # whatever --logging_nan_inf_filter makes of it
    run.console.report(shown, step=state.global_step, rate=as_text(rates))
    run.nonfinite.check(state)


def emit(
    run: Run, state: TrainState, logs: Mapping[str, float], extras: Mapping[str, float], *, timed: bool = False
) -> dict[str, float]:
    """Collective: complete a row for the history and, with `extras` of ours, for the trackers; returns the row."""
    row = {**logs, "epoch": state.epoch}
    if run.work.counts != "no":
        row["num_input_tokens_seen"] = state.num_input_tokens_seen
        if timed:
            row |= run.clock.rates(num_tokens=state.num_input_tokens_seen - run.clock.first_tokens)
    state.log_history.append({**row, "step": state.global_step})
    run.accelerator.log(rewrite({**row, **extras}), step=state.global_step)
    return row


def evaluate(run: Run, state: TrainState, *, at_start: bool = False) -> bool:
    """Collective: evaluate on all sets; returns whether this was the best evaluation so far."""
    run.watchdog.at(EVALUATION, state.global_step)
    run.work.settle_tokens(state)
    run.optimizer.eval()  # schedule-free optimizers evaluate and save other weights than they train
    metrics: dict[str, float] = {}
    previous = last_evaluation(state.log_history)
    for data in run.eval_sets:
        outcome = run.evaluator.run(run.model, data)
        of_set = run.hooks.with_values(outcome.metrics, run.view(state, eval_set=data.prefix))
        emit(run, state, of_set, outcome.extras)
        run.console.evaluation(of_set, step=state.global_step)
        metrics |= of_set
    if run.tables is not None and run.tracker.config.tables_every.is_due(state.epoch, state.global_step, previous):
        run.tracker.log_media(run.tables.make(run.bare_model, epoch=state.epoch), step=state.global_step)
    run.model.train()
    if at_start:  # before the first step; the Trainer does not count it as a best either
        return False
    if run.best.metric is not None and run.optim.lr_scheduler_type in BY_METRIC:
        run.scheduler.step(metrics[run.best.metric])
    is_best = run.best.update(metrics, state)
    run.pruning.heed(state)
    return is_best


def heed_stop(run: Run, state: TrainState) -> None:
    """
    Collective: if the ranks have agreed to stop, save and raise StoppedError.

    Raises CheckpointError instead if another process has taken over folder and W&B run: then nothing is written.
    """
    if is_over(run, state):  # the training ends here anyway
        return
    reason = run.stop.agreed(state.global_step)
    if reason == StopReason.NONE:
        return
    where = f"step {state.global_step} of {run.plan.max_steps}"
    if reason == StopReason.SHUT_OUT:
        raise CheckpointError(f"Another process has taken over {run.checkpoints.output_dir}: this one ends at {where}.")
    if reason > StopReason.REQUESTED:
        run.tracker.mark_preempting()
    folder = run.checkpoints.output_dir if run.plan.config.save_strategy != "no" else None
    run.checkpoints.settle()
    if folder is not None and run.checkpoints.saved_step != state.global_step:
        run.nonfinite.check_last(state)
        save(run, state)
        run.checkpoints.check_last()
    raise stopped(reason, at=where, saved_in=folder, until=run.plan.max_steps)


def finish(run: Run, state: TrainState) -> dict[str, float]:
    """Collective: return the metrics of the whole training; load the best weights if they were asked for."""
    run.watchdog.at(END, state.global_step)
    run.stop.settled()
    run.nonfinite.settle(state)
    # As the Trainer: what rank zero has not reported; the mean over the ranks would be another number.
    state.total_loss += run.window.undrained()
    steps = state.global_step - run.clock.first_step
    metrics = run.clock.rates(num_samples=run.num_samples(steps), num_steps=steps)
    run.work.settle(state)
    metrics["total_flos"] = state.total_flos
    metrics["train_loss"] = state.total_loss / max(state.global_step - state.loss_from_step, 0.001)
    emit(run, state, metrics, {})
    run.checkpoints.settle()
    take_best(run, state)
    return metrics
