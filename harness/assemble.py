"""Put a run together: the task, its checks, and all that the loop works with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from harness import rng
from harness.arguments import Config
from harness.best import BestModel
from harness.changes import Changes, compare, recorded
from harness.checkpoint import Saved, describe_change
from harness.config import ConfigError
from harness.console import Console
from harness.data import (
    DataConfig,
    LengthGroups,
    Samples,
    build_eval_loader,
    first_samples,
    usable_samples,
)
from harness.evaluation import EvalSet, Evaluator
from harness.export import load_weights
from harness.loader import TrainLoader
from harness.loop import Run
from harness.metrics import Clock, Window, Work
from harness.modeling import Loss, prepare_model
from harness.optim import build_optimizer, build_scheduler
from harness.plan import Plan, resolve_plan
from harness.position import at_step, converted, has_other_layout, why_other_order
from harness.saving import Checkpoints
from harness.state import TRAINER_STATE_FILE, TrainState
from harness.stopping import Stop
from harness.tasks import Task, resolve
from harness.topology import agree, local_main_first, software
from harness.tracking import WandbTracker
from harness.tracking.tables import SampleTables

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a command works with, whether it trains or not."""

    config: Config
    accelerator: Accelerator
    task: Task
    loss: Loss
    evaluator: Evaluator
    output_dir: Path
    console: Console


def assemble(config: Config, accelerator: Accelerator, output_dir: Path, *, weights: Path | None) -> Session:
    """
    Collective: build the task, check it against the flags, set the model up; `weights` are those to go on from.

    Raises ConfigError for all that the flags ask for and the task does not have. Writes nothing.
    """
    seed, full_determinism = config.topology.seed, config.topology.full_determinism
    # As Transformers' example scripts: a new head is drawn from the seed; then the Trainer seeds again.
    rng.seed_everything(seed, full_determinism=full_determinism)
    task = local_main_first(accelerator, lambda: resolve(config.task.task)(config.task))
    rng.seed_everything(seed, full_determinism=full_determinism)
    _check_data(config, task)
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
        drops_non_finite=config.metrics.logging_nan_inf_filter,
        counts_all_ranks=config.modeling.average_tokens_across_devices,
    )
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
    return usable_samples(dataset, task.data_collator, task.model, config, group=group)


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
    model, optimizer = accelerator.prepare(task.model, build_optimizer(task.model, config.optim))
    saves = config.plan.save_strategy != "no"
    return Run(
        accelerator=accelerator,
        model=model,
        processing_class=task.processing_class,
        loss=session.loss,
        optimizer=optimizer,
        # Not prepared: accelerate would step it once for each process.
        scheduler=build_scheduler(optimizer, config.optim, plan.max_steps),
        loader=loader,
        plan=plan,
        evaluator=session.evaluator,
        eval_sets=eval_sets(session),
        best=BestModel(config.best, metric=config.best_metric, keeps_checkpoints=saves),
        checkpoints=Checkpoints(
            session.output_dir,
            config.checkpoint,
            ranks=(accelerator.process_index, accelerator.num_processes),
            agree=lambda error: agree(accelerator, error),
            gather=lambda value: gather_object([value]),
        ),
        window=Window(accelerator, config.metrics),
        work=Work(
            task.model,
            config.metrics,
            accelerator,
            samples_per_step=samples_per_step,
            pad_token_id=getattr(task.processing_class, "pad_token_id", None),
        ),
        clock=Clock(state),
        console=session.console,
        tracker=tracker,
        tables=_sample_tables(session, tracker),
        stop=Stop(accelerator, requested=lambda: tracker.stop_requested),
        modeling=config.modeling,
        optim=config.optim,
        arguments=_arguments(session, plan),
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
    if predict is None or count is None or not (session.accelerator.is_main_process and tracker.config.uses_wandb):
        return None
    return SampleTables(predict, session.task.eval_dataset, num_samples=count)


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
    if best is not None and not Path(best).is_dir():
        logger.warning("The best checkpoint %s is gone; it can't be loaded at the end.", best)
        state.best_model_checkpoint = None
    _restore_optimizer(run, saved)
    if run.accelerator.scaler is not None and "scaler.pt" in saved.files:
        run.accelerator.scaler.load_state_dict(saved.files["scaler.pt"])
    if change := describe_change(saved.shared.get("software", {}), software()):
        logger.warning("%s was saved with %s: numbers may differ in their last bits.", saved.path, change)
    changes, other_numbers = _check_changes(run, saved)
    if changes.told:
        run.console.line(f"Other arguments than those of {saved.path.name}: {', '.join(changes.told)}.")
    run.tracker.load_state_dict(saved.shared.get("tracking", {}), changes=other_numbers)
    position, is_exact = _position(run, state, saved)
    if saved.rank_state is None:
        logger.warning("%s has no random state for this rank: the run goes on, but not to the bit.", saved.path)
        run.loader.load_position(position)
        return
    ours = saved.rank_state.get("harness", {})
    # What was drawn ahead elsewhere is another batch here.
    run.loader.load_state_dict(position, ours.get("data", {}) if is_exact else {}, saved.rank_state)
    if saved.other_ranks and "window" in ours:
        run.window.load_state_dicts([other["harness"]["window"] for other in saved.other_ranks])
    elif "window" in ours:
        run.window.load_state_dict(ours["window"])


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
    try:
        run.optimizer.load_state_dict(saved.files["optimizer.pt"])
        run.scheduler.load_state_dict(saved.files["scheduler.pt"])
    except (ValueError, KeyError, RuntimeError) as error:
        reason = f"{saved.path} holds the state of another optimizer or schedule ({error})"
        raise ConfigError(f"{reason}; give the flags it was saved with.") from error


def weights_dtype(config: Config) -> torch.dtype | None:
    """What --bf16_full_eval and --fp16_full_eval ask for."""
    evaluation = config.evaluation
    return torch.bfloat16 if evaluation.bf16_full_eval else torch.float16 if evaluation.fp16_full_eval else None
