"""Build a run: the task, the checks of it against the flags, and everything that the loop works with."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.integrations import is_deepspeed_zero3_enabled

from harness.agent import sweep_run
from harness.agent.processes import is_orphan
from harness.checkpoint.arguments import recorded
from harness.checkpoint.disk import share_beside
from harness.checkpoint.fit import Asked
from harness.checkpoint.writer import Checkpoints
from harness.build.checks import check_best_metric, check_data, tell_of_labels
from harness.data.flags import DataConfig
from harness.data.loader import TrainLoader
from harness.data.samples import first_samples
from harness.distributed.backend import Backend, Stepper
from harness.distributed.ranks import agree, is_first, main_process_first, ranks_of
from harness.errors import ConfigError
from harness.fitting.reduction import DDP_BUCKET_MB, LateReduction
from harness.fitting.search import Trial, check_findable, find_size, size_kept
from harness.fitting.splitting import Splitting
from harness.flags import Config
from harness.model.adapters import add_adapter, check_scores
from harness.model.flops import flops_of
from harness.model.optim import build_optimizer, build_scheduler, check_elementwise, name_of
from harness.resume import models_from_wandb
from harness.session import Run, Session
from harness.slurm import time_limit_at
from harness.tasks import Builder, Task, TaskConfig, resolve
from harness.tasks.checks import build_task
from harness.tasks.text.flags import prompts_of
from harness.tracking import WandbTracker
from harness.tracking.media.tables import SampleTables
from harness.tracking.media.texts import Texts
from harness.training import rng
from harness.training.best import BestModel
from harness.training.console import Console, set_up_logging
from harness.training.evaluation import Evaluator
from harness.training.flags import ConsoleConfig
from harness.training.hooks import Hooks
from harness.training.loss import Loss, prepare_model
from harness.training.metrics import Clock, NonFinite, Window, Work
from harness.training.plan import Plan, resolve_plan
from harness.training.state import TrainState
from harness.training.stopping import Agent, Pruning, Stop, TimeLimit
from harness.training.throughput import Throughput
from harness.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What is known of a training before anything of a checkpoint is loaded."""

    loader: TrainLoader
    plan: Plan
    asked: Asked


def assemble(
    config: Config, backend: Backend, output_dir: Path, *, is_resumed: bool, builder: Builder | None = None
) -> Session:
    """
    Collective: build the task, check it against the flags, set up the model; weights to resume are loaded later.

    A `builder` takes the place of the one that --task names. Raises ConfigError for everything that the flags ask for
    and the task lacks. Writes nothing.
    """
    if not is_resumed and builder is None:  # a builder may bring a model
        config.check_weights()
    accelerator, local = backend.accelerator, not config.task.preprocess_on_main
    task_config, artifacts = main_process_first(
        accelerator, lambda: models_from_wandb(config.task, config.tracking), local=local
    )
    seed, full_determinism = config.topology.seed, config.topology.full_determinism
    # As in Transformers' example scripts: a new head is drawn from the seed; then the Trainer seeds again.
    rng.seed_everything(seed, full_determinism=full_determinism)
    # With zero3_init_flag all ranks make the model together; the data is still prepared by one (tasks/splits.py).
    at_once = is_deepspeed_zero3_enabled()
    if not (at_once or is_first(accelerator, local=local)):
        task_config = replace(task_config, overwrite_cache=False)  # the first rank has just rebuilt it
    task = main_process_first(
        accelerator, lambda: _build(task_config, builder, config.console, accelerator), local=local, at_once=at_once
    )
    task = replace(task, model=add_adapter(task.model, config.adapters))
    rng.seed_everything(seed, full_determinism=full_determinism)
    check_data(config, task, accelerator.num_processes)
    if config.adapters.save_merged_model and backend.is_sharded:
        raise ConfigError(
            "--save_merged_model needs whole weights in one place, and ZeRO-3 and FSDP divide them; leave it out."
        )
    task = _on_few_batches(task, config.data, accelerator.num_processes)
    if not is_resumed and task.check is not None and config.run.trains:
        task.check(task.model)
    prepare_model(task.model, config.modeling, task.processing_class, accelerator)
    loss = Loss(task.model, config.modeling, accelerator, task.compute_loss_func)
    hooks = Hooks(task)
    evaluator = _evaluator(config, task, hooks, loss)
    check_scores(task.model, has_scores=evaluator.metrics is not None)
    check_best_metric(config, task, evaluator)
    tell_of_labels(task, loss)
    progress = config.console.shows_progress and not config.debug.is_on  # a bar and a debugger disturb each other
    console = Console(enabled=accelerator.is_main_process, progress=progress)
    return Session(
        config=config,
        accelerator=accelerator,
        backend=backend,
        task=task,
        hooks=hooks,
        loss=loss,
        evaluator=evaluator,
        output_dir=output_dir,
        console=console,
        artifacts=artifacts,
    )


def _on_few_batches(task: Task, config: DataConfig, num_processes: int) -> Task:
    """Return the task with the data that --overfit_batches leaves."""
    if config.overfit_batches is None:
        return task
    per_batch = config.per_device_train_batch_size * num_processes
    samples = first_samples(task.train_dataset, config.overfit_batches * per_batch)
    return replace(task, train_dataset=samples, eval_dataset=samples)


def _evaluator(config: Config, task: Task, hooks: Hooks, loss: Loss) -> Evaluator:
    return Evaluator(
        loss.accelerator,
        loss=loss,
        metrics=None if config.evaluation.prediction_loss_only else task.metrics,
        generate=task.generate,
        drops_non_finite=config.metrics.logging_nan_inf_filter,
        logged_outputs=hooks.logged_outputs,
    )


def _build(task_config: TaskConfig, builder: Builder | None, console: ConsoleConfig, accelerator: Accelerator) -> Task:
    if builder is None:
        resolve(task_config.task)
    # A second time, for the libraries that the task has imported.
    set_up_logging(console, is_main=accelerator.is_main_process, is_local_main=accelerator.is_local_main_process)
    return build_task(task_config, builder)


def plan_run(session: Session, saved: Mapping[str, Any] | None = None, *, size: int | None = None) -> Planned:
    """
    Collective: make the loader of the training data, and the plan. Raises ConfigError.

    With --auto_find_batch_size the micro-batches have `size` samples, or as many as those of the checkpoint whose
    manifest is `saved`, if its steps are the same.
    """
    config, accelerator, task = session.config, session.accelerator, session.task
    data: DataConfig = config.data
    if data.overfit_batches is not None:
        data = replace(data, train_sampling_strategy="sequential")
    of_device = data.per_device_train_batch_size * data.gradient_accumulation_steps
    kept = size_kept(saved or {}, of_device, accelerator.num_processes) if data.auto_find_batch_size else None
    if (size := size or kept) is not None:
        data = replace(data, per_device_train_batch_size=size, gradient_accumulation_steps=of_device // size)
    accumulation = data.gradient_accumulation_steps
    data_seed = config.topology.seed if data.data_seed is None else data.data_seed
    samples = session.samples(
        task.train_dataset,
        of_device,
        seed=None,
        order_seed=data_seed if data.train_sampling_strategy == "random" else None,
    )
    fills = config.modeling.loss_scaling == "trainer"
    loader = TrainLoader(samples, data, accelerator, seed=config.topology.seed, fills=fills)
    samples_per_step: float = of_device * accelerator.num_processes
    if loader.by_tokens is not None:
        samples_per_step = (loader.num_samples or 0) / math.ceil((loader.num_batches or 1) / accumulation)
    plan = resolve_plan(
        config.plan,
        num_batches=loader.num_batches,
        num_samples=loader.num_documents,
        accumulation=accumulation,
        samples_per_step=samples_per_step * loader.documents_per_sample,
    )
    plan = replace(plan, generate_steps=config.task.generate_steps)
    asked = Asked(
        arguments=_arguments(session, plan),
        loader=loader,
        config=config.checkpoint,
        optimizer=None if task.build_optimizer is not None else name_of(config.optim, None),
        zero_stage=session.backend.zero_stage,
    )
    return Planned(loader=loader, plan=plan, asked=asked)


def build_run(
    session: Session,
    planned: Planned,
    state: TrainState,
    tracker: WandbTracker,
    saved: Mapping[str, Any] | None = None,
) -> Run:
    """
    Collective: make optimizer and schedule, and wrap them and the model as the Trainer wraps them.

    `saved` is the manifest of the checkpoint that is restored next, if there is one.
    """
    config, accelerator, backend, task = session.config, session.accelerator, session.backend, session.task
    optimizer, optimizer_name = _optimizer(session)
    planned = _with_size_that_fits(session, planned, optimizer, saved or {})
    plan = planned.plan
    plan.show_in(state)
    state.train_batch_size = planned.loader.config.per_device_train_batch_size
    model, optimizer, stepper = backend.prepare(task.model, optimizer, session.step_size)
    session.check_rows(model)
    saves = config.plan.save_strategy != "no"
    window = Window(accelerator, config.metrics, session.hooks.logged_outputs)
    work = _work(session)
    checkpoints = _checkpoints(session)
    stop = _stop(session, tracker, checkpoints)
    return Run(
        accelerator=accelerator,
        backend=backend,
        model=model,
        processing_class=task.processing_class,
        hooks=session.hooks,
        loss=session.loss,
        optimizer=optimizer,
        # Not passed to `prepare`: accelerate would step it once for each process.
        scheduler=build_scheduler(optimizer, config.optim, plan.max_steps),
        stepper=stepper,
        splitting=_splitting(session, planned, model, window, stepper),
        loader=planned.loader,
        plan=plan,
        evaluator=session.evaluator,
        eval_sets=session.eval_sets(),
        best=BestModel(config.best, metric=config.best_metric, keeps_checkpoints=saves),
        checkpoints=checkpoints,
        window=window,
        nonfinite=NonFinite(accelerator, config.stopping, scales_loss=stepper.scales_loss),
        work=work,
        throughput=_throughput(session, work),
        clock=Clock(state),
        console=session.console,
        tracker=tracker,
        tables=_sample_tables(session, tracker),
        texts=_texts(session, tracker),
        stop=stop,
        pruning=Pruning(config.stopping.pruning_file, accelerator, is_stopping=lambda: stop.is_noted),
        watchdog=Watchdog(config.watchdog, ranks=ranks_of(accelerator), timeout_seconds=config.topology.ddp_timeout),
        modeling=config.modeling,
        optim=config.optim,
        optimizer_name=optimizer_name,
        arguments=planned.asked.arguments,
    )


def _with_size_that_fits(
    session: Session, planned: Planned, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]
) -> Planned:
    """Collective: with --auto_find_batch_size return the plan with the largest micro-batches that fit in memory."""
    loader, task = planned.loader, session.task
    given = loader.config
    if not given.auto_find_batch_size:
        return planned
    check_findable(task.model, session.backend, session.config.modeling, session.config.topology)
    of_device = given.per_device_train_batch_size * given.gradient_accumulation_steps
    size = given.per_device_train_batch_size
    kept = size_kept(saved, of_device, session.accelerator.num_processes)
    if kept is not None:
        size, why = kept, "as in the checkpoint"
    elif loader.stream is not None:
        why = "as given, since a stream is not read ahead"
    else:
        size = find_size(Trial(model=task.model, loss=session.loss, optimizer=optimizer, loader=loader))
        why = "the most that fit in memory"
    if size != given.per_device_train_batch_size:
        planned = plan_run(session, size=size)
    session.console.line(
        f"Micro-batches have {size} samples, {why}; a device takes {of_device // size} of them in a step."
    )
    return planned


def _splitting(
    session: Session, planned: Planned, model: torch.nn.Module, window: Window, stepper: Stepper
) -> Splitting:
    """Collective: make what goes on after an out-of-memory; with several ranks it has a process group of its own."""
    config, accelerator = planned.loader.config, session.accelerator
    splitting = Splitting(
        session.loss,
        window,
        stepper,
        session.console,
        batch_size=config.per_device_train_batch_size,
        is_on=config.auto_find_batch_size,
    )
    if splitting.is_on and accelerator.num_processes > 1:
        bucket_mb = session.config.topology.ddp_bucket_cap_mb or DDP_BUCKET_MB
        splitting.reduction = LateReduction(accelerator, model, bucket_mb=bucket_mb)
    return splitting


def _optimizer(session: Session) -> tuple[torch.optim.Optimizer, str]:
    """Return the optimizer, of the task's making where it makes one, and its name for checkpoints."""
    config, model = session.config.optim, session.task.model
    made = session.hooks.optimizer(model)
    optimizer = build_optimizer(model, config, made)
    if made is not None and session.backend.zero_stage:
        check_elementwise(optimizer)
    return optimizer, name_of(config, made)


def _work(session: Session) -> Work:
    config, task = session.config, session.task
    pad_token_id = getattr(task.processing_class, "pad_token_id", None)
    return Work(
        task.model, config.metrics, session.accelerator, pad_token_id=pad_token_id, packs=config.task.packing
    )


def _throughput(session: Session, work: Work) -> Throughput:
    return Throughput(
        session.task.model,
        session.config.throughput,
        session.accelerator,
        flops_per_token=work.flos_per_element,
        flops=flops_of(session.task.model),
        has_targets=lambda: session.loss.labels_tokens,
    )


def _checkpoints(session: Session) -> Checkpoints:
    """Collective: make the writer of checkpoints; its writers' agreement may be a process group of its own."""
    accelerator = session.accelerator
    return Checkpoints(
        session.output_dir,
        session.config.checkpoint,
        ranks=ranks_of(accelerator),
        agree=lambda error: agree(accelerator, error),
        gather=lambda value: gather_object([value]),
        meet=session.backend.writers_agreement(),
        share=share_beside(accelerator.device, accelerator.num_processes),
    )


def _stop(session: Session, tracker: WandbTracker, checkpoints: Checkpoints) -> Stop:
    return Stop(
        session.accelerator,
        requested=lambda: tracker.stop_requested,
        time_limit=_time_limit(session, checkpoints),
        is_shut_out=lambda: checkpoints.is_shut_out,
        saves=session.config.plan.save_strategy != "no",
        at_step=session.config.stopping.stop_at_step,
        agent=None if sweep_run() is None else Agent(is_gone=is_orphan, was_stopped=tracker.was_stopped),
    )


def _time_limit(session: Session, checkpoints: Checkpoints) -> TimeLimit | None:
    """Return rank zero's time limit; None where a stop ahead of it would save nothing that can be resumed."""
    config = session.config
    resumable = config.plan.save_strategy != "no" and not config.checkpoint.save_only_model
    if not session.accelerator.is_main_process or not resumable:
        return None
    return TimeLimit(config.stopping, ends_at=time_limit_at, to_save=checkpoints.seconds_to_save)


def _arguments(session: Session, plan: Plan) -> dict[str, Any]:
    accelerator = session.accelerator
    return recorded(
        session.config.flat(),
        mixed_precision=accelerator.mixed_precision,
        device=accelerator.device.type,
        num_processes=accelerator.num_processes,
        total_steps=plan.max_steps,
    )


def _sample_tables(session: Session, tracker: WandbTracker) -> SampleTables | None:
    predict, count = session.task.predict_samples, tracker.config.wandb_eval_samples
    takes_part = session.accelerator.is_main_process or session.backend.is_sharded
    if predict is None or count is None or not (takes_part and tracker.config.uses_wandb):
        return None
    device = session.accelerator.device
    return SampleTables(predict, session.task.eval_dataset, num_samples=count, device=device)


def _texts(session: Session, tracker: WandbTracker) -> Texts | None:
    config, task = session.config.task, session.task
    prompts = prompts_of(config) if config.generate_steps is not None else []
    draw = task.draw if config.generate_samples is not None else None
    takes_part = session.accelerator.is_main_process or session.backend.is_sharded
    if not ((prompts or draw) and takes_part):
        return None
    device, say = session.accelerator.device, session.console.line
    seed = session.config.topology.seed
    return Texts(task.complete, prompts, draw, seed=seed, device=device, say=say, tracker=tracker)
