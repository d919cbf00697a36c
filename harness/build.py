"""Put a run together: the task, its checks, and all that the loop works with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import unwrap_peft_model

from harness.checkpoint.arguments import recorded
from harness.checkpoint.writer import Checkpoints
from harness.data.flags import DataConfig
from harness.data.loader import TrainLoader
from harness.data.samples import LengthGroups, Samples, build_eval_loader, first_samples, usable_samples
from harness.distributed.backend import AcceleratedStepper, Stepper, ZeroStepper, check_wrapped
from harness.distributed.fsdp2 import check_sharded, is_fsdp, prepare_fsdp, shard_for_evaluation, writers_group
from harness.distributed.ranks import agree, is_first, main_process_first
from harness.distributed.zero import fill_config, is_zero, zero_stage
from harness.errors import ConfigError
from harness.flags import Config
from harness.loop import Run
from harness.model.adapters import add_adapter, check_scores
from harness.model.optim import build_optimizer, build_scheduler
from harness.model.weights import is_sharded, load_weights
from harness.resume import models_from_wandb
from harness.slurm import time_limit_at
from harness.tasks import Task, resolve
from harness.tracking import WandbTracker
from harness.tracking.media.tables import SampleTables
from harness.training import rng
from harness.training.best import BestModel
from harness.training.console import Console
from harness.training.evaluation import EvalSet, Evaluator
from harness.training.loss import Loss, prepare_model
from harness.training.metrics import Clock, Window, Work
from harness.training.schedule import Plan, resolve_plan
from harness.training.state import TrainState
from harness.training.stopping import Stop, TimeLimit
from harness.training.throughput import Throughput
from harness.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a command works with, whether it trains or not. `artifacts` are versions in W&B that the model is from."""

    config: Config
    accelerator: Accelerator
    task: Task
    loss: Loss
    evaluator: Evaluator
    output_dir: Path
    console: Console
    artifacts: tuple[str, ...]


def assemble(config: Config, accelerator: Accelerator, output_dir: Path, *, weights: Path | None) -> Session:
    """
    Collective: build the task, check it against the flags, set the model up; `weights` are those to go on from.

    Raises ConfigError for all that the flags ask for and the task does not have. Writes nothing.
    """
    local = not config.task.preprocess_on_main
    task_config, artifacts = main_process_first(
        accelerator, lambda: models_from_wandb(config.task, config.tracking), local=local
    )
    seed, full_determinism = config.topology.seed, config.topology.full_determinism
    # As Transformers' example scripts: a new head is drawn from the seed; then the Trainer seeds again.
    rng.seed_everything(seed, full_determinism=full_determinism)
    # With zero3_init_flag ranks divide a model while it is made; the data one of them prepares (tasks/text.py).
    at_once = is_deepspeed_zero3_enabled()
    if not (at_once or is_first(accelerator, local=local)):
        task_config = replace(task_config, overwrite_cache=False)  # the first has just made it anew
    task = main_process_first(accelerator, lambda: resolve(task_config.task)(task_config), local=local, at_once=at_once)
    task = replace(task, model=add_adapter(task.model, config.adapters))
    rng.seed_everything(seed, full_determinism=full_determinism)
    _check_data(config, task)
    if config.adapters.save_merged_model and (is_fsdp(accelerator) or zero_stage(accelerator) == 3):
        raise ConfigError(
            "--save_merged_model needs whole weights in one place, and ZeRO-3 and FSDP divide them; leave it out."
        )
    if config.data.overfit_batches is not None:
        per_batch = config.data.per_device_train_batch_size * accelerator.num_processes
        samples = first_samples(task.train_dataset, config.data.overfit_batches * per_batch)
        task = replace(task, train_dataset=samples, eval_dataset=samples)
    if weights is not None:
        load_weights(task.model, weights)
    prepare_model(task.model, config.modeling, task.processing_class, accelerator)
    loss = Loss(task.model, config.modeling, accelerator, task.compute_loss_func)
    evaluator = Evaluator(
        accelerator,
        loss=loss,
        num_items=loss.num_items,
        label_names=loss.label_names,
        metrics=None if config.evaluation.prediction_loss_only else task.metrics,
        generate=task.generate,
        drops_non_finite=config.metrics.logging_nan_inf_filter,
        counts_all_ranks=config.modeling.average_tokens_across_devices,
    )
    check_scores(task.model, has_scores=evaluator.metrics is not None)
    _check_best_metric(config, task, evaluator)
    progress = config.console.shows_progress and not config.debug.is_on  # a bar and a debugger fight
    console = Console(enabled=accelerator.is_main_process, progress=progress)
    return Session(
        config=config,
        accelerator=accelerator,
        task=task,
        loss=loss,
        evaluator=evaluator,
        output_dir=output_dir,
        console=console,
        artifacts=artifacts,
    )


def _check_data(config: Config, task: Task) -> None:
    needs_eval = config.plan.eval_strategy != "no" or config.plan.eval_on_start or config.run.do_eval
    if config.run.trains and task.train_dataset is None:
        raise ConfigError(f"--task={config.task.task} has no training data: give --train_file or --dataset_name.")
    if config.run.trains and hasattr(task.train_dataset, "__len__") and len(task.train_dataset) == 0:
        raise ConfigError("The training data is empty.")
    if needs_eval and task.eval_dataset is None and config.data.overfit_batches is None:
        flag = f"--eval_strategy {config.plan.eval_strategy}" if config.plan.eval_strategy != "no" else "An evaluation"
        raise ConfigError(f"{flag} needs validation data: give --validation_file, or a data set that has some.")
    if config.run.do_predict and task.test_dataset is None:
        raise ConfigError("--do_predict needs test data: give --test_file, or a data set with a test split.")
    count = config.tracking.wandb_eval_samples
    if count is not None and config.tracking.uses_wandb and config.run.trains:
        if config.plan.eval_strategy == "no":
            raise ConfigError(f"--wandb_eval_samples={count} needs evaluations: give --eval_strategy epoch or steps.")
        if task.predict_samples is None:
            raise ConfigError(
                f"--wandb_eval_samples={count}: --task={config.task.task} has no predict_samples that shows what the "
                "model makes of samples; give it one, or leave the flag out."
            )


def _check_best_metric(config: Config, task: Task, evaluator: Evaluator) -> None:
    if config.best_metric is None or config.plan.eval_strategy == "no":
        return
    sets = task.eval_dataset if isinstance(task.eval_dataset, Mapping) else {None: task.eval_dataset}
    prefixes = ["eval" if name is None else f"eval_{name}" for name in sets]
    known = sorted(f"{prefix}_{name}" for prefix in prefixes for name in evaluator.metric_names())
    if config.best_metric not in known:
        raise ConfigError(
            f"--metric_for_best_model={config.best.metric_for_best_model or 'loss'} is in no evaluation; "
            f"there are: {', '.join(known)}."
        )


def eval_sets(session: Session) -> tuple[EvalSet, ...]:
    """The validation sets, ready: one as `eval`, several as `eval_<name>`."""
    dataset = session.task.eval_dataset
    if dataset is None:
        return ()
    if not isinstance(dataset, Mapping):
        return (eval_set(session, dataset, "eval"),)
    return tuple(eval_set(session, part, f"eval_{name}") for name, part in dataset.items())


def eval_set(session: Session, dataset: Any, prefix: str) -> EvalSet:
    """One set to evaluate or to predict on."""
    config = session.config.data
    samples = _samples(session, dataset, config.per_device_eval_batch_size, seed=_data_seed(session.config))
    loader = build_eval_loader(samples, config, session.accelerator)
    return EvalSet(prefix=prefix, loader=loader, batch_size=config.per_device_eval_batch_size)


def _samples(session: Session, dataset: Any, group_size: int, seed: int | None) -> Samples:
    task, config = session.task, session.config.data
    group = None
    if config.train_sampling_strategy == "group_by_length" and hasattr(dataset, "__len__"):
        names = getattr(task.processing_class, "model_input_names", None) or ["input_ids"]
        group = LengthGroups(size=group_size, input_name=names[0], seed=seed)
    return usable_samples(dataset, task.data_collator, unwrap_peft_model(task.model), config, group=group)


def _data_seed(config: Config) -> int:
    return config.topology.seed if config.data.data_seed is None else config.data.data_seed


def build_run(session: Session, state: TrainState, tracker: WandbTracker) -> Run:
    """Collective: loaders, plan, optimizer, schedule, wrapped as the Trainer wraps them."""
    config, accelerator, task = session.config, session.accelerator, session.task
    data: DataConfig = config.data
    if data.overfit_batches is not None:
        data = replace(data, train_sampling_strategy="sequential")
    accumulation = data.gradient_accumulation_steps
    samples = _samples(session, task.train_dataset, data.per_device_train_batch_size * accumulation, seed=None)
    loader = TrainLoader(samples, data, accelerator, seed=config.topology.seed)
    ranks = (accelerator.process_index, accelerator.num_processes)
    samples_per_step = data.per_device_train_batch_size * accumulation * accelerator.num_processes
    plan = resolve_plan(
        config.plan,
        num_batches=loader.num_batches,
        num_samples=loader.num_samples,
        accumulation=accumulation,
        samples_per_step=samples_per_step,
    )
    plan.show_in(state)
    state.train_batch_size = data.per_device_train_batch_size
    model, optimizer, stepper = _prepared(session)
    saves = config.plan.save_strategy != "no"
    pad_token_id = getattr(task.processing_class, "pad_token_id", None)
    work = Work(task.model, config.metrics, accelerator, pad_token_id=pad_token_id)
    checkpoints = Checkpoints(
        session.output_dir,
        config.checkpoint,
        ranks=ranks,
        agree=lambda error: agree(accelerator, error),
        gather=lambda value: gather_object([value]),
        meet=writers_group(accelerator) if is_fsdp(accelerator) else lambda _: None,
    )
    return Run(
        accelerator=accelerator,
        model=model,
        processing_class=task.processing_class,
        loss=session.loss,
        optimizer=optimizer,
        # Not prepared: accelerate would step it once for each process.
        scheduler=build_scheduler(optimizer, config.optim, plan.max_steps),
        stepper=stepper,
        loader=loader,
        plan=plan,
        evaluator=session.evaluator,
        eval_sets=eval_sets(session),
        best=BestModel(config.best, metric=config.best_metric, keeps_checkpoints=saves),
        checkpoints=checkpoints,
        window=Window(accelerator, config.metrics),
        work=work,
        throughput=Throughput(task.model, config.throughput, accelerator, flops_per_token=work.flos_per_element),
        clock=Clock(state),
        console=session.console,
        tracker=tracker,
        tables=_sample_tables(session, tracker),
        stop=_stop(session, tracker, checkpoints),
        watchdog=Watchdog(config.watchdog, ranks=ranks, timeout_seconds=config.topology.ddp_timeout),
        modeling=config.modeling,
        optim=config.optim,
        arguments=_arguments(session, plan),
    )


def _stop(session: Session, tracker: WandbTracker, checkpoints: Checkpoints) -> Stop:
    return Stop(
        session.accelerator,
        requested=lambda: tracker.stop_requested,
        time_limit=_time_limit(session, checkpoints),
        is_shut_out=lambda: checkpoints.is_shut_out,
    )


def _time_limit(session: Session, checkpoints: Checkpoints) -> TimeLimit | None:
    """What rank zero looks at; nothing where a stop ahead of the limit would save nothing that can be resumed."""
    config = session.config
    resumable = config.plan.save_strategy != "no" and not config.checkpoint.save_only_model
    if not session.accelerator.is_main_process or not resumable:
        return None
    return TimeLimit(config.stopping, ends_at=time_limit_at, to_save=checkpoints.seconds_to_save)


def _prepared(session: Session) -> tuple[torch.nn.Module, AcceleratedOptimizer, Stepper]:
    """Collective: model and optimizer, wrapped, and what makes a step of them. Raises ConfigError."""
    config, accelerator, model = session.config, session.accelerator, session.task.model
    if is_zero(accelerator):
        if config.topology.compiles:
            raise ConfigError("--torch_compile is not supported with DeepSpeed by this version; leave it out.")
        _fill_deepspeed(session)
    if is_fsdp(accelerator):
        prepare_fsdp(accelerator, model)
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model, config.optim))
    if is_fsdp(accelerator):
        check_sharded(wrapped)
    check_wrapped(wrapped, accelerator.distributed_type)
    if is_zero(accelerator):
        return wrapped, optimizer, ZeroStepper(wrapped, optimizer)
    return wrapped, optimizer, AcceleratedStepper(accelerator, wrapped, optimizer)


def prepare_for_evaluation(session: Session) -> torch.nn.Module:
    """Collective: the model, wrapped as far as an evaluation without a training needs it."""
    accelerator, model = session.accelerator, session.task.model
    wrapped: torch.nn.Module
    if is_fsdp(accelerator):
        wrapped = shard_for_evaluation(accelerator, model)
    elif zero_stage(accelerator) < 3:
        wrapped = accelerator.prepare_model(model, evaluation_mode=True)
    else:
        _fill_deepspeed(session)
        wrapped = accelerator.prepare(model)
    return wrapped


def _fill_deepspeed(session: Session) -> None:
    data, modeling = session.config.data, session.config.modeling
    fill_config(
        session.accelerator,
        batch_size=data.per_device_train_batch_size,
        accumulation=data.gradient_accumulation_steps,
        max_grad_norm=modeling.max_grad_norm,
    )


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
    takes_part = session.accelerator.is_main_process or is_sharded(session.task.model)
    if predict is None or count is None or not (takes_part and tracker.config.uses_wandb):
        return None
    return SampleTables(predict, session.task.eval_dataset, num_samples=count)


def weights_dtype(config: Config) -> torch.dtype | None:
    """What --bf16_full_eval and --fp16_full_eval ask for."""
    evaluation = config.evaluation
    return torch.bfloat16 if evaluation.bf16_full_eval else torch.float16 if evaluation.fp16_full_eval else None
