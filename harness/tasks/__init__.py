"""Tasks: the model, data and scores of a run. Each file is a task; `resolve` finds them by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

from harness.errors import ConfigError
from harness.tasks.flags import SHIPPED, TaskConfig

if TYPE_CHECKING:  # the parser imports this package and must not load torch
    import numpy.typing as npt
    import torch
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

__all__ = [
    "AfterEvaluation",
    "AfterStep",
    "BuildOptimizer",
    "Builder",
    "Complete",
    "Draw",
    "Generate",
    "LossFunction",
    "Metrics",
    "PredictSamples",
    "SamplePredictions",
    "Task",
    "TaskConfig",
    "View",
    "is_whole",
    "own_builder",
    "resolve",
]

OWN = "harness:run"  # what --task is recorded as where model and data are arguments of that function
DATASETS = ("train_dataset", "eval_dataset", "test_dataset")


class Metrics(Protocol):
    """
    A score computed batch by batch in O(1) memory: one object for one evaluation.

    `names` are the keys of `compute()`, known before training so that `--metric_for_best_model` can be checked.
    """

    names: tuple[str, ...]

    def predictions(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Reduce a rank's logits (batch, ...) to what the score needs, on the device, before they are gathered."""

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: all ranks' predictions and labels, padding samples removed, on the device."""

    def compute(self) -> dict[str, float]:
        """Return the values, without a prefix. One transfer from the device."""


@dataclass(frozen=True, kw_only=True)
class SamplePredictions:
    """
    A model's predictions on some samples, for a table: a row a sample, a value a column.

    A classification may add the data of a confusion matrix and precision-recall curves: the names of all classes, the
    samples' true ids, and their probabilities (samples, classes). Raises ValueError for other sizes.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int]]
    class_names: Sequence[str] | None = None
    labels: Sequence[int] | None = None
    probabilities: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if "epoch" in self.columns:
            raise ValueError("the column epoch is added to every table; name yours differently.")
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"each row needs {len(self.columns)} values: {', '.join(self.columns)}.")
        for name in ("labels", "probabilities"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.rows):
                raise ValueError(f"{name} holds {len(values)} values for {len(self.rows)} rows; give one a row.")


@dataclass(frozen=True, kw_only=True)
class View:
    """
    What after_step and after_evaluation see of a training. To look at: the loop goes on as it would have.

    - global_step, max_steps: the optimizer steps that are done, and those of the plan. epoch: a fraction.
    - log_due: whether the step is reported. To read a value waits for the device, as a report does anyway: who returns
      values only then, or at some steps, leaves the others as fast as they were.
    - batches: the micro-batches of the step, this rank's, on its device; () after an evaluation.
    - eval_set: `eval`, or `eval_<name>` where there are several; "" after a step.
    - model, optimizer: as they are trained, wrapped; without a training there is no optimizer.
    """

    global_step: int
    max_steps: int
    epoch: float
    log_due: bool = False
    batches: Sequence[Mapping[str, Any]] = ()
    eval_set: str = ""
    model: torch.nn.Module
    optimizer: AcceleratedOptimizer | None
    accelerator: Accelerator

    @property
    def bare_model(self) -> torch.nn.Module:
        """The model without any wrapper; sharded, its parameters are this rank's parts."""
        bare: torch.nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return bare

    @property
    def num_processes(self) -> int:
        """The number of ranks."""
        return int(self.accelerator.num_processes)

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank zero, whose values are recorded."""
        return bool(self.accelerator.is_main_process)


Values = Mapping[str, Any]
AfterStep = Callable[[View], "Values | None"]
BuildOptimizer = Callable[["torch.nn.Module"], "Sequence[Mapping[str, Any]] | torch.optim.Optimizer"]
AfterEvaluation = Callable[[View, Mapping[str, float]], "Values | None"]
PredictSamples = Callable[["torch.nn.Module", Sequence[Any]], SamplePredictions]
Complete = Callable[["torch.nn.Module", Sequence[str]], Sequence[str]]
Draw = Callable[["torch.nn.Module"], Sequence[tuple[str, str]]]
Generate = Callable[["torch.nn.Module", Mapping[str, Any]], "torch.Tensor"]
LossFunction = Callable[[Any, "torch.Tensor | None", "torch.Tensor | None"], "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """
    What a builder returns. Only model, train_dataset and data_collator are needed to train.

    - model: takes the collator's keys as arguments; returns a mapping with "loss" (or a tuple that starts with it),
      unless compute_loss_func computes it from the outputs and the popped "labels".
    - train_dataset, eval_dataset, test_dataset: map-style or iterable; eval_dataset may be a dict of them, each
      evaluated as eval_<name>.
    - data_collator: list of samples to a dict of tensors, batch first. If it draws random numbers it takes them
      from torch's, numpy's or Python's global generator.
    - processing_class: saved with each checkpoint (a tokenizer, an image processor ...).
    - compute_loss_func(outputs, labels, num_items_in_batch) -> scalar: as the Trainer's argument of that name.
    - check(model): raises ConfigError for a model that this task can't train. Called once, before the first step of a
      new run; it leaves the model as it is.
    - metrics: makes a fresh Metrics for each evaluation.
    - generate(model, batch) -> (batch, tokens): what the metrics get in place of the logits, and an evaluation keeps as
      predictions. Each rank calls it for its own batch, with the unwrapped model in eval mode, without gradients.
    - sample(model) -> text: shown when training is over. Runs on rank zero only.
    - describe_predictions(predictions) -> lines of predict_results.txt for --do_predict.
    - predict_samples(model, samples) -> the table of --wandb_eval_samples, in columns of the task's own choice. The
      model is the unwrapped one in eval mode, without gradients; samples are the first of an evaluation set, as the
      collator takes them. Runs on rank zero only. It may draw random numbers and switch the model's modes: both are
      put back.
    - complete(model, prompts) -> a text for each: what --generate_steps shows. The model is the unwrapped one in eval
      mode, without gradients. Runs on rank zero only, or on all if the model is sharded. It may draw random numbers and
      switch the model's modes: both are put back.
    - draw(model) -> pairs of a prompt, which may be empty, and a text: what --generate_samples shows after an
      evaluation. As `complete`; the random generators are seeded from --seed and the step, on all ranks alike.
    - after_step(view) -> values by name, or None: called on all ranks after each optimizer step, before what is due at
      it. Rank zero's values are recorded, once over all attempts of a run, in the row of the step's report or in one of
      their own: as NAME in the history, as train/NAME in the trackers. Numbers, also of numpy, and tensors of one
      element. What it remembers from step to step is lost with the process, unless it is a buffer of the model.
    - after_evaluation(view, metrics) -> values by name, or None: called on all ranks after each evaluation of a set, by
      --do_eval too, while the model is in eval mode. `metrics` are those of the set, named as in its row; the values
      join that row, NAME as eval_NAME (of several sets eval_<name>_NAME). --metric_for_best_model can't name them, as
      they are not known before the first evaluation: what is to decide belongs into metrics.
    - logged_outputs: names of scalars among the model's outputs (a router's loss, the parts of a loss). A report shows
      the mean of each over the global batches since the last one, without a further wait for the device. Metrics do not
      get them as predictions.
    - build_optimizer(model) -> parameter groups for the optimizer of --optim, or the optimizer itself, one of torch's
      class. The model is not wrapped yet; under ZeRO-3 its parameters may be empty, and `ds_shape` is their shape.
      Groups take --learning_rate, --weight_decay and the like where they don't say it themselves; a flag that would do
      nothing is refused. The schedule multiplies each group's learning rate. Saved and resumed like any other.
    """

    model: torch.nn.Module
    train_dataset: Any
    data_collator: Callable[[list[Any]], Mapping[str, Any]]
    eval_dataset: Any = None
    test_dataset: Any = None
    processing_class: Any = None
    compute_loss_func: LossFunction | None = None
    check: Callable[[torch.nn.Module], None] | None = None
    metrics: Callable[[], Metrics] | None = None
    generate: Generate | None = None
    sample: Callable[[torch.nn.Module], str] | None = None
    describe_predictions: Callable[[npt.NDArray[Any]], list[str]] | None = None
    predict_samples: PredictSamples | None = None
    complete: Complete | None = None
    draw: Draw | None = None
    after_step: AfterStep | None = None
    logged_outputs: tuple[str, ...] = ()
    build_optimizer: BuildOptimizer | None = None
    after_evaluation: AfterEvaluation | None = None


Builder = Callable[[TaskConfig], Task]


def resolve(name: str) -> Builder:
    """Return the builder of a shipped task by its name, or of `package.module:function`. Raises ConfigError."""
    if name == OWN:
        raise ConfigError(f"--task={name}: model and data were arguments of harness.run in Python; call it again.")
    module_name, _, attribute = SHIPPED.get(name, name).partition(":")
    try:
        builder: Builder = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        # A missing import inside of the user's own module is raised with its traceback.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"--task={name}: no module {error.name}; is its folder installed or on PYTHONPATH?"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"--task={name}: module {module_name} has no {attribute}.") from error
    return builder


def is_whole(own: Mapping[str, Any]) -> bool:
    """Whether these values of a Task's fields are a task of their own: a model, and data."""
    return own.get("model") is not None and any(own.get(name) is not None for name in DATASETS)


def own_builder(own: Mapping[str, Any]) -> Builder:
    """
    Return the builder of a task with `own` values of its fields: of these alone, or in place of those of --task.

    Without a collator it is the Trainer's: one that pads with the processing class, or stacks. Raises ConfigError for
    names that a Task does not have.
    """
    known = [field.name for field in fields(Task)]
    if unknown := [name for name in own if name not in known]:
        raise ConfigError(f"harness.run takes no {unknown[0]}; it takes what a Task has: {', '.join(known)}.")

    def build(config: TaskConfig) -> Task:
        if not is_whole(own):
            return replace(resolve(config.task)(config), **own)
        return Task(**{"train_dataset": None, "data_collator": _collator(own.get("processing_class")), **own})

    return build


def _collator(processing_class: Any) -> Any:
    from transformers import (
        DataCollatorWithPadding,
        PreTrainedTokenizerBase,
        SequenceFeatureExtractor,
        default_data_collator,
    )

    pads = isinstance(processing_class, (PreTrainedTokenizerBase, SequenceFeatureExtractor))
    return DataCollatorWithPadding(processing_class) if pads else default_data_collator
