"""Tasks: what a run trains, on what, and how it is judged. One file a task; `resolve` finds them by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt
import torch

from harness.config import Json, arg, at_least, choice
from harness.errors import ConfigError

SHIPPED = {
    "causal-lm": "harness.tasks.text.causal_lm:build",
    "image-classification": "harness.tasks.image.classification:build",
    "masked-lm": "harness.tasks.text.masked_lm:build",
    "seq2seq": "harness.tasks.text.seq2seq:build",
    "sequence-classification": "harness.tasks.text.sequence_classification:build",
    "token-classification": "harness.tasks.text.token_classification:build",
}
# Flags that one shipped task reads and that are off unless they are given.
OWNERS = {
    "generation_max_length": "seq2seq",
    "generation_num_beams": "seq2seq",
    "image_column_name": "image-classification",
    "image_processor_name": "image-classification",
    "label_all_tokens": "token-classification",
    "max_source_length": "seq2seq",
    "max_target_length": "seq2seq",
    "predict_with_generate": "seq2seq",
    "source_prefix": "seq2seq",
    "summary_column": "seq2seq",
    "train_dir": "image-classification",
    "validation_dir": "image-classification",
    "without_augmentation": "image-classification",
}


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Model and data, in the names of Transformers' example scripts."""

    task: str = arg("causal-lm", f"One of {', '.join(SHIPPED)}, or your own as package.module:function.")
    task_args: Json | None = arg(help="JSON for a task of your own; it reads what it likes from it.")

    model_name_or_path: str | None = arg(
        help="Model to start from: on the Hub, a folder, or wandb:ENTITY/PROJECT/NAME:ALIAS."
    )
    model_type: str | None = arg(help="Architecture to train from scratch, e.g. gpt2; see --config_overrides.")
    config_name: str | None = arg(help="Config on the Hub or folder; defaults to the model's.")
    config_overrides: str | None = arg(help="Changes to the config: n_embd=64,n_layer=2,resid_pdrop=0.1.")
    tokenizer_name: str | None = arg(help="Tokenizer on the Hub or folder; defaults to the model's.")
    cache_dir: str | None = arg(help="Where the Hub's files are kept.")
    model_revision: str = arg("main", "Branch, tag or commit on the Hub, for model, config and tokenizer.")
    token: str | None = arg(help="Token for the Hub; better: `hf auth login`. Never recorded.")
    trust_remote_code: bool = arg(False, "Run code that comes with a model or data set on the Hub.")
    dtype: str | None = arg(help="Load the weights as auto, bfloat16, float16 or float32.")
    attn_implementation: str | None = arg(help="Attention: eager, sdpa, flash_attention_2, ...")
    ignore_mismatched_sizes: bool = arg(False, "Load a head of another size: it is made anew.")

    dataset_name: str | None = arg(help="Data set on the Hub, or a folder written by save_to_disk.")
    dataset_config_name: str | None = arg(help="Configuration of the data set on the Hub.")
    task_name: str | None = arg(help="A GLUE task: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli.")
    train_file: str | None = arg(help="Training data: csv, tsv, json, jsonl, txt or parquet.")
    validation_file: str | None = arg(help="Validation data, same formats.")
    test_file: str | None = arg(help="Data to predict on, same formats.")
    train_dir: str | None = arg(help="image-classification: folder with training images, a subfolder a class.")
    validation_dir: str | None = arg(help="image-classification: folder with validation images, likewise.")
    train_split_name: str = arg("train", "Split to train on.")
    validation_split_name: str | None = arg(
        help="Split to evaluate on; default: validation, dev or validation_matched."
    )
    test_split_name: str | None = arg(help="Split to predict on; default: test.")
    validation_split_percentage: int = arg(5, "Share of the training data to hold out where there is no validation.")
    streaming: bool = arg(False, "Read the data set as a stream; needs --max_steps.")
    text_column_names: str | None = arg(help="Columns that hold the text, separated by commas; two make pairs.")
    text_column_delimiter: str = arg(" ", "Put between the columns when more than two are joined.")
    label_column_name: str | None = arg(help="Column that holds the label; default: label or labels.")
    max_train_samples: int | None = arg(help="Use only the first N training samples.")
    max_eval_samples: int | None = arg(help="Use only the first N validation samples.")
    max_predict_samples: int | None = arg(help="Use only the first N samples to predict on.")
    preprocessing_num_workers: int | None = arg(help="Processes that prepare the data.")
    preprocess_on_main: bool = arg(
        False, "Rank zero of all nodes prepares the data first, for a cache they share; default: the first of each."
    )
    overwrite_cache: bool = arg(False, "Prepare the data again even if the prepared form is cached.")

    block_size: int | None = arg(help="causal-lm: tokens a training sample; default: the model's maximum, up to 1024.")
    keep_linebreaks: bool = arg(True, "causal-lm: keep the line breaks of txt files.")
    max_seq_length: int | None = arg(help="Longest sequence after tokenisation; longer ones are cut.")
    pad_to_max_length: bool = arg(False, "Pad all samples to --max_seq_length instead of to the batch's longest.")
    mlm_probability: float = arg(0.15, "masked-lm: share of the tokens to mask.")
    line_by_line: bool = arg(False, "masked-lm: each line is a sample of its own.")
    do_regression: bool | None = arg(
        help="sequence-classification: the label is a number; default: by its type.", nargs="?", const=True
    )
    metric_name: str | None = arg(help="Of classifiers: accuracy, f1, matthews_correlation, pearson, ...")
    label_all_tokens: bool = arg(False, "token-classification: label all tokens of a word, not its first alone.")
    image_column_name: str | None = arg(help="image-classification: column of the images; default: image.")
    image_processor_name: str | None = arg(
        help="image-classification: image processor on the Hub or folder; defaults to the model's."
    )
    without_augmentation: bool = arg(
        False, "image-classification: train on the images as they are, not on random crops and mirror images."
    )
    summary_column: str | None = arg(help="seq2seq: column of the text to write; default: summary.")
    source_prefix: str | None = arg(help="seq2seq: put before each text to read, e.g. 'summarize: ' for T5.")
    max_source_length: int | None = arg(help="seq2seq: most tokens of a text to read; default: up to 1024.")
    max_target_length: int | None = arg(help="seq2seq: most tokens of a text to write; default: up to 128.")
    predict_with_generate: bool = arg(
        False, "seq2seq: evaluate the texts that the model writes (ROUGE, BLEU); needs rouge-score and sacrebleu."
    )
    generation_max_length: int | None = arg(
        help="Most tokens of a text with --predict_with_generate; default: --max_target_length."
    )
    generation_num_beams: int | None = arg(help="Beams with --predict_with_generate; default: the model's.")

    def __post_init__(self) -> None:
        at_least(
            1,
            max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples,
            max_predict_samples=self.max_predict_samples,
            preprocessing_num_workers=self.preprocessing_num_workers,
            block_size=self.block_size,
            max_seq_length=self.max_seq_length,
            max_source_length=self.max_source_length,
            max_target_length=self.max_target_length,
            generation_max_length=self.generation_max_length,
            generation_num_beams=self.generation_num_beams,
        )
        if not 0 < self.validation_split_percentage < 100:
            raise ConfigError(f"--validation_split_percentage={self.validation_split_percentage}: use 1 to 99.")
        if not 0 < self.mlm_probability < 1:
            raise ConfigError(f"--mlm_probability={self.mlm_probability}: use a share between 0 and 1.")
        if self.dtype is not None:
            choice("dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        if ":" not in self.task:
            choice("task", self.task, tuple(SHIPPED))
            self._check_owners()
        named = [name for name in ("dataset_name", "train_file", "train_dir") if getattr(self, name)]
        if len(named) > 1:
            raise ConfigError(f"--{named[0]} and --{named[1]} both name the training data; give one of them.")
        if self.validation_file and self.validation_dir:
            raise ConfigError("--validation_file and --validation_dir both name the validation data; give one of them.")

    def _check_owners(self) -> None:
        """Refuse flags that the shipped task does not read; a task of one's own may read any."""
        for flag, owner in OWNERS.items():
            value = getattr(self, flag)
            if value not in (None, False) and self.task != owner:
                raise ConfigError(
                    f"--{flag}={value} is of --task {owner}, and --task={self.task} does not read it; leave it out."
                )
        for flag in ("generation_max_length", "generation_num_beams"):
            if getattr(self, flag) is not None and not self.predict_with_generate:
                raise ConfigError(
                    f"--{flag}={getattr(self, flag)} does nothing without --predict_with_generate; give both."
                )


class Metrics(Protocol):
    """
    A score computed piece by piece in O(1) memory: one object for one evaluation.

    `names` are the keys of `compute()`, known before training so that `--metric_for_best_model` can be checked.
    """

    names: tuple[str, ...]

    def predictions(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Reduce a rank's logits (batch, ...) to what the score needs, on the device, before they are gathered."""

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: all ranks' predictions and labels, padding samples removed, on the device."""

    def compute(self) -> dict[str, float]:
        """The values, without a prefix. One transfer from the device."""


@dataclass(frozen=True, kw_only=True)
class SamplePredictions:
    """
    What a model makes of some samples, for a table: a row a sample, a value a column.

    A classification may add what a confusion matrix and precision-recall curves are drawn from: the names of all
    classes, the samples' true ids, and their probabilities (samples, classes). Raises ValueError for other sizes.
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


PredictSamples = Callable[[torch.nn.Module, Sequence[Any]], SamplePredictions]
Generate = Callable[[torch.nn.Module, Mapping[str, Any]], torch.Tensor]
LossFunction = Callable[[Any, "torch.Tensor | None", "torch.Tensor | None"], torch.Tensor]


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
    - metrics: makes a fresh Metrics for each evaluation.
    - generate(model, batch) -> (batch, tokens): what the metrics get in place of the logits, and an evaluation keeps as
      predictions. Each rank calls it for its own batch, with the unwrapped model in eval mode, without gradients.
    - sample(model) -> text: shown when training is over. Runs on rank zero only.
    - describe_predictions(predictions) -> lines of predict_results.txt for --do_predict.
    - predict_samples(model, samples) -> the table of --wandb_eval_samples, in columns of the task's own choice. The
      model is the unwrapped one in eval mode, without gradients; samples are the first of an evaluation set, as the
      collator takes them. Runs on rank zero only. It may draw random numbers and switch the model's modes: both are
      put back.
    """

    model: torch.nn.Module
    train_dataset: Any
    data_collator: Callable[[list[Any]], Mapping[str, Any]]
    eval_dataset: Any = None
    test_dataset: Any = None
    processing_class: Any = None
    compute_loss_func: LossFunction | None = None
    metrics: Callable[[], Metrics] | None = None
    generate: Generate | None = None
    sample: Callable[[torch.nn.Module], str] | None = None
    describe_predictions: Callable[[npt.NDArray[Any]], list[str]] | None = None
    predict_samples: PredictSamples | None = None


Builder = Callable[[TaskConfig], Task]


def resolve(name: str) -> Builder:
    """The builder behind a shipped task's name or a `package.module:function`. Raises ConfigError."""
    module_name, _, attribute = SHIPPED.get(name, name).partition(":")
    try:
        builder: Builder = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        # A module that the user's own module lacks is their bug to see, with its traceback.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"--task={name}: no module {error.name}; is its folder installed or on PYTHONPATH?"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"--task={name}: module {module_name} has no {attribute}.") from error
    return builder
