"""The flags of tasks, model and data sources, in the names of Transformers' example scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from harness.config import Json, arg, at_least, choice, flags_of, section, together
from harness.errors import ConfigError
from harness.tasks.image.flags import ImageClassificationFlags
from harness.tasks.text.flags import (
    DocumentFlags,
    GenerationFlags,
    LanguageModelFlags,
    Seq2SeqFlags,
    TextFlags,
    TokenClassificationFlags,
)

SHIPPED = {
    "causal-lm": "harness.tasks.text.causal_lm:build",
    "image-classification": "harness.tasks.image.classification:build",
    "masked-lm": "harness.tasks.text.masked_lm:build",
    "seq2seq": "harness.tasks.text.seq2seq:build",
    "sequence-classification": "harness.tasks.text.sequence_classification:build",
    "token-classification": "harness.tasks.text.token_classification:build",
}

# Each names the training data; and what is said of a data set that is given by its name.
TRAINING_DATA = ("dataset_name", "train_file", "train_dir")
OF_DATA_SETS = ("dataset_config_name", "train_split_name", "validation_split_name", "test_split_name")


@section("model")
@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What is trained, and where it is from, in the names of Transformers' example scripts."""

    task: str = arg("causal-lm", f"One of {', '.join(SHIPPED)}, or your own as package.module:function.", common=True)
    task_args: Json | None = arg(help="JSON for a task of your own; it reads what it likes from it.")
    model_name_or_path: str | None = arg(
        help="Model to start from: on the Hub, a folder, or wandb:ENTITY/PROJECT/NAME:ALIAS.", path="model", common=True
    )
    model_type: str | None = arg(
        help="Architecture to train from scratch, e.g. gpt2; see --config_overrides.", common=True
    )
    config_name: str | None = arg(help="Config on the Hub or folder; defaults to the model's.", path="model")
    config_overrides: str | None = arg(help="Changes to the config: n_embd=64,n_layer=2,resid_pdrop=0.1.")
    tokenizer_name: str | None = arg(
        help="Tokenizer on the Hub or folder; defaults to the model's.", path="model", common=True
    )
    cache_dir: str | None = arg(help="Where the Hub's files are kept.", on_resume="unrelated")
    model_revision: str = arg("main", "Branch, tag or commit on the Hub, for model, config and tokenizer.")
    token: str | None = arg(help="Token for the Hub; better: `hf auth login`. Never recorded.", on_resume="unrelated")
    trust_remote_code: bool = arg(
        False, "Run code that comes with a model or data set on the Hub.", on_resume="unrelated"
    )
    dtype: str | None = arg(help="Load the weights as auto, bfloat16, float16 or float32.")
    attn_implementation: str | None = arg(help="Attention: eager, sdpa, flash_attention_2, ...")
    ignore_mismatched_sizes: bool = arg(False, "Load a head of another size: it is made anew.")

    def __post_init__(self) -> None:
        if self.dtype is not None:
            choice("dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        if ":" not in self.task:
            choice("task", self.task, tuple(SHIPPED))


@section("data")
@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """Where the data is from, and how much of it is used."""

    dataset_name: str | None = arg(
        help="Data set on the Hub, or a folder written by save_to_disk.", path="model", common=True
    )
    dataset_config_name: str | None = arg(help="Configuration of the data set on the Hub.")
    task_name: str | None = arg(help="A GLUE task: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli.", common=True)
    train_file: list[str] | None = arg(
        help="Training data: csv, tsv, json, jsonl, txt or parquet; files, folders or patterns; also .gz and .zst.",
        path="file",
        common=True,
    )
    validation_file: list[str] | None = arg(help="Validation data, likewise.", path="file", common=True)
    test_file: list[str] | None = arg(help="Data to predict on, likewise.", path="file", on_resume="free")
    csv_delimiter: str | None = arg(help="What divides the cells of csv and tsv files; default: comma, in tsv tab.")
    csv_quoting: str | None = arg(
        help="minimal: quotes may enclose a cell; none: they are text; default: minimal, in tsv none."
    )
    csv_header: bool = arg(True, "The first row names the columns; else they are column1, column2, ...")
    train_split_name: str = arg("train", "Split to train on.")
    validation_split_name: str | None = arg(
        help="Split to evaluate on; default: validation, dev or validation_matched."
    )
    test_split_name: str | None = arg(help="Split to predict on; default: test.", on_resume="free")
    validation_split_percentage: int = arg(5, "Share of the training data to hold out where there is no validation.")
    streaming: bool = arg(False, "Read the data set as a stream; needs --max_steps.")
    label_column_name: str | None = arg(help="Column that holds the label; default: label or labels.", common=True)
    metric_name: str | None = arg(
        help="Of classifiers: accuracy, f1, matthews_correlation, pearson, ...", on_resume="free"
    )
    max_train_samples: int | None = arg(help="Use only the first N training samples.", common=True)
    max_eval_samples: int | None = arg(help="Use only the first N validation samples.", on_resume="free")
    max_predict_samples: int | None = arg(help="Use only the first N samples to predict on.", on_resume="free")
    preprocessing_num_workers: int | None = arg(help="Processes that prepare the data.", on_resume="unrelated")
    preprocess_on_main: bool = arg(
        False,
        "Rank zero of all nodes prepares the data first, for a cache they share; default: the first of each.",
        on_resume="unrelated",
    )
    overwrite_cache: bool = arg(
        False, "Prepare the data again even if the prepared form is cached.", on_resume="unrelated"
    )

    def __post_init__(self) -> None:
        at_least(
            1,
            max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples,
            max_predict_samples=self.max_predict_samples,
            preprocessing_num_workers=self.preprocessing_num_workers,
        )
        if self.csv_quoting is not None:
            choice("csv_quoting", self.csv_quoting, ("minimal", "none"))
        delimiter = self.csv_delimiter
        if delimiter not in (None, "tab", "\\t") and (len(str(delimiter)) != 1 or str(delimiter) in '"\r\n'):
            raise ConfigError(f"--csv_delimiter={delimiter}: give one character, or tab.")
        if not 0 < self.validation_split_percentage < 100:
            raise ConfigError(f"--validation_split_percentage={self.validation_split_percentage}: use 1 to 99.")


@dataclass(frozen=True, kw_only=True)
class TaskConfig(
    ImageClassificationFlags,
    Seq2SeqFlags,
    TokenClassificationFlags,
    GenerationFlags,
    DocumentFlags,
    LanguageModelFlags,
    TextFlags,
    SourceFlags,
    ModelFlags,
):
    """
    What a task's builder is given: the flags of model and data, and those of each task.

    The flags of a task stand beside it, in a section whose group has the task's name; the parts only hold fields.
    """

    def __post_init__(self) -> None:
        for name in ("train_file", "validation_file", "test_file"):
            if isinstance(value := getattr(self, name), str):  # a builder may give one path as it is
                object.__setattr__(self, name, [value])
        of_parts = [partial(part.__post_init__, self) for part in PARTS if hasattr(part, "__post_init__")]
        together([*of_parts, self._check_owners, self._check_sources])

    def _check_sources(self) -> None:
        if self.block_size is not None and self.max_length is not None:
            raise ConfigError(
                f"--block_size={self.block_size} joins texts to blocks, and --max_length={self.max_length} keeps them "
                "apart; give one of them."
            )
        named = [name for name in TRAINING_DATA if getattr(self, name)]
        if len(named) > 1:
            raise ConfigError(f"--{named[0]} and --{named[1]} both name the training data; give one of them.")
        if self.validation_file and self.validation_dir:
            raise ConfigError("--validation_file and --validation_dir both name the validation data; give one of them.")

    def _check_owners(self) -> None:
        """Refuse flags of another shipped task; a task of one's own may read any."""
        if self.task not in SHIPPED:
            return
        for name, owner in OWNERS.items():
            value = getattr(self, name)
            if owner != self.task and value != flags_of(TaskConfig)[name].default:
                raise ConfigError(
                    f"--{name}={value} is of --task {owner}, and --task={self.task} does not read it; leave it out."
                )
        for name in ("generation_max_length", "generation_num_beams"):
            if getattr(self, name) is not None and not self.predict_with_generate:
                raise ConfigError(
                    f"--{name}={getattr(self, name)} does nothing without --predict_with_generate; give both."
                )


def under(given: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return what a recipe gives under flags that are given beside it.

    Where these name other training data, that of the recipe is left out, with what says which part of it is taken.
    """
    named = [name for name in TRAINING_DATA if given.get(name)]
    left_out = {name for name in TRAINING_DATA if named and name not in named}
    if named and "dataset_name" not in named:
        left_out |= set(OF_DATA_SETS)
    return {name: value for name, value in recipe.items() if name not in left_out}


PARTS = TaskConfig.__bases__
# Flags that one shipped task reads, and no other takes: those of the group with its name.
OWNERS = {name: flag.group for name, flag in flags_of(TaskConfig).items() if flag.group in SHIPPED}
