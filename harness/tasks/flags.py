"""The flags of tasks, model and data sources, in the names of Transformers' example scripts."""

from __future__ import annotations

from dataclasses import dataclass

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
