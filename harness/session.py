"""The objects that a command works with: a Session, and a Run if it trains. build/ makes both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers.trainer_utils import unwrap_peft_model

from harness.checkpoint.writer import Checkpoints
from harness.data.by_tokens import TokenLimit
from harness.data.isolation import check_isolation, without_look_for_padding
from harness.data.lengths import LengthGroups
from harness.data.loader import TrainLoader
from harness.data.packing import Packing, check_rows_of_evaluation, packed
from harness.data.samples import Samples, build_eval_loader, usable_samples
from harness.distributed.backend import Backend, Stepper, StepSize
from harness.fitting.splitting import Splitting
from harness.flags import Config
from harness.model.flags import OptimConfig
from harness.tasks import Task, TaskConfig, View
from harness.tracking import WandbTracker
from harness.tracking.media.tables import SampleTables
from harness.tracking.media.texts import Texts
from harness.training.best import BestModel
from harness.training.console import Console
from harness.training.evaluation import EvalSet, Evaluator
from harness.training.flags import ModelingConfig
from harness.training.hooks import Hooks
from harness.training.loss import Loss
from harness.training.metrics import Clock, NonFinite, Window, Work
from harness.training.plan import Plan
from harness.training.state import TrainState
from harness.training.stopping import Pruning, Stop
from harness.training.throughput import Throughput
from harness.training.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a command needs, whether it trains or not. `artifacts` are the W&B versions that the model is from."""

    config: Config
    accelerator: Accelerator
    backend: Backend
    task: Task
    hooks: Hooks
    loss: Loss
    evaluator: Evaluator
    output_dir: Path
    console: Console
    artifacts: tuple[str, ...]

    @property
    def step_size(self) -> StepSize:
        """The size of an optimizer step, as the flags give it."""
        data = self.config.data
        return StepSize(
            batch_size=data.per_device_train_batch_size,
            accumulation=data.gradient_accumulation_steps,
            max_grad_norm=self.config.modeling.max_grad_norm,
            is_reduced_late=data.auto_find_batch_size,
        )

    def eval_sets(self) -> tuple[EvalSet, ...]:
        """Return the validation sets, ready to use: a single one as `eval`, several as `eval_<name>`."""
        dataset = self.task.eval_dataset
        if dataset is None:
            return ()
        if not isinstance(dataset, Mapping):
            return (self.eval_set(dataset, "eval"),)
        return tuple(self.eval_set(part, f"eval_{name}") for name, part in dataset.items())

    def eval_set(self, dataset: Any, prefix: str) -> EvalSet:
        """Return one set to evaluate or to predict on."""
        config, seed = self.config.data, self.config.topology.seed
        batch_size = config.per_device_eval_batch_size
        samples = self.samples(dataset, batch_size, seed=seed if config.data_seed is None else config.data_seed)
        if self.config.task.packing and not samples.is_stream:
            check_rows_of_evaluation(len(samples.dataset), config, self.accelerator.num_processes)
        return EvalSet(
            prefix=prefix,
            loader=build_eval_loader(samples, config, self.accelerator),
            batch_size=batch_size,
            order=samples.eval_order,
            num_batches=None if samples.by_tokens is None else len(samples.by_tokens),
        )

    def check_rows(self, model: torch.nn.Module) -> None:
        """Collective: with --packing raise ConfigError for a wrapped model in which documents of a row see others."""
        config, data = self.config.task, self.config.data
        if config.packing:
            without_look_for_padding(model)
            most = max(data.per_device_train_batch_size, data.per_device_eval_batch_size)
            check_isolation(model, self.loss, max_length=config.max_length or 0, num_rows=most)

    def samples(self, dataset: Any, group_size: int, *, seed: int | None, order_seed: int | None = None) -> Samples:
        """
        Return a data set as the model takes it, to train on, or with a seed to evaluate on.

        With grouping by length it is in groups of `group_size` samples, or else it may be divided by tokens. With
        --packing its samples are rows, of documents in an order drawn from `order_seed`, or else in the data's.
        """
        task, config = self.task, self.config.data
        if self.config.task.packing:
            return packed(dataset, packing_of(self.config.task, task.processing_class, seed=order_seed))
        group: LengthGroups | TokenLimit | None = None
        if config.max_tokens_per_batch is not None:
            group = self._token_limit(config.max_tokens_per_batch, evaluates=seed is not None)
        elif config.train_sampling_strategy == "group_by_length" and hasattr(dataset, "__len__"):
            names = getattr(task.processing_class, "model_input_names", None) or ["input_ids"]
            group = LengthGroups(size=group_size, input_name=names[0], seed=seed)
        model, labels = unwrap_peft_model(task.model), self.loss.label_names
        return usable_samples(dataset, task.data_collator, model, config, labels=labels, group=group)

    def _token_limit(self, max_tokens: int, *, evaluates: bool) -> TokenLimit:
        config, seed = self.config.data, self.config.topology.seed
        of_model = getattr(self.task.model, "config", None)
        # What a decoder reads is padded by itself.
        targets = ("labels",) if getattr(of_model, "is_encoder_decoder", False) else ()
        return TokenLimit(
            max_tokens=max_tokens,
            names=("input_ids", *targets),
            seed=seed if config.data_seed is None else config.data_seed,
            in_order=config.train_sampling_strategy == "sequential" and not evaluates,
            num_ranks=self.accelerator.num_processes if evaluates else 1,
        )


def packing_of(config: TaskConfig, processing_class: Any, *, seed: int | None) -> Packing:
    """Return how the flags have documents packed. What pads is never seen: without a token for it, any will do."""
    names = ("pad_token_id", "eos_token_id")
    padding = next((found for name in names if (found := getattr(processing_class, name, None)) is not None), 0)
    return Packing(
        max_length=config.max_length or 0, window=config.packing_window, pad_token_id=int(padding), seed=seed
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a training needs. `model` is the wrapped one."""

    accelerator: Accelerator
    backend: Backend
    model: torch.nn.Module
    processing_class: Any
    hooks: Hooks
    loss: Loss
    optimizer: AcceleratedOptimizer
    scheduler: Any
    stepper: Stepper
    splitting: Splitting
    loader: TrainLoader
    plan: Plan
    evaluator: Evaluator
    eval_sets: tuple[EvalSet, ...]
    best: BestModel
    checkpoints: Checkpoints
    window: Window
    nonfinite: NonFinite
    work: Work
    throughput: Throughput
    clock: Clock
    console: Console
    tracker: WandbTracker
    tables: SampleTables | None
    texts: Texts | None
    stop: Stop
    pruning: Pruning
    watchdog: Watchdog
    modeling: ModelingConfig
    optim: OptimConfig
    optimizer_name: str
    arguments: Mapping[str, Any]

    @property
    def bare_model(self) -> torch.nn.Module:
        """The model without any wrapper, torch.compile's included."""
        bare: torch.nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return bare

    def num_samples(self, num_steps: int) -> float:
        """Return the samples of steps of this process: a share of the plan's, or of packed streams what was drawn."""
        if self.loader.num_samples is None and self.loader.packing is not None:
            return float(self.loader.documents_drawn * self.accelerator.num_processes)
        return self.plan.num_samples * num_steps / max(self.plan.max_steps, 1)

    def view(self, state: TrainState, **of_the_moment: Any) -> View:
        """Return what the task's functions see of this training now."""
        return view_of(self.accelerator, self.model, state, optimizer=self.optimizer, **of_the_moment)


def view_of(accelerator: Accelerator, model: torch.nn.Module, state: TrainState, **more: Any) -> View:
    """Return what the task's functions see of a model, which is the wrapped one."""
    return View(
        global_step=state.global_step,
        max_steps=state.max_steps,
        epoch=state.epoch,
        accelerator=accelerator,
        model=model,
        **more,
    )
