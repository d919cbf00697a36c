"""Generate a text from another (summaries, translations), as Transformers' run_summarization and run_translation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy.typing as npt
import torch
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from harness.errors import ConfigError
from harness.tasks import Task
from harness.tasks.flags import TaskConfig
from harness.tasks.predictions import written
from harness.tasks.pretrained import (
    check_length,
    load_config,
    load_model,
    load_tokenizer,
    longest_sequence,
    require_padding,
)
from harness.tasks.rows import load_splits
from harness.tasks.scores.classification import IGNORED, TokenAccuracy
from harness.tasks.scores.generated import TextScores, decoded
from harness.tasks.splits import Split, Splits, as_text, column_names, require_tokens, texts_of
from harness.tasks.text.prompts import answering

# The example scripts' defaults.
SOURCE_LENGTH, TARGET_LENGTH = 1024, 128
OF_THE_TARGET = ("labels", "decoder_input_ids", "decoder_attention_mask")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of the source text, joined if there are several, and the column of the target text."""

    source: Sequence[str]
    target: str


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The most tokens of a source text, of a target text in training, and of a generated text."""

    source: int
    target: int
    generated: int


def build(config: TaskConfig) -> Task:
    """
    Read pairs of texts and load or make an encoder-decoder model.

    A sample holds the tokenizer's keys of the source text and "labels", (tokens,) of the target; test data may lack
    targets with --predict_with_generate. Raises ConfigError for input that the user can correct.
    """
    splits = load_splits(config)
    columns = _columns(config, splits)
    tokenizer = load_tokenizer(config)
    require_padding(tokenizer)
    model_config = load_config(config, tokenizer)
    _set_start(config, model_config, tokenizer)
    lengths = _lengths(config, tokenizer, model_config)
    metrics = partial(TextScores, tokenizer) if config.predict_with_generate else partial(TokenAccuracy, shift=0)
    metrics()  # raises ConfigError for a missing package, before the model is loaded
    rows = splits.hold_out(config).cut(config)
    samples = rows.map(lambda split: _samples(split, columns, tokenizer, lengths, config))
    model = load_model(config, AutoModelForSeq2SeqLM, model_config, tokenizer)
    collate = partial(_collated, pad=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED))
    generate = _generator(config, lengths)
    return Task(
        model=model,
        train_dataset=samples.rows("train"),
        eval_dataset=samples.rows("validation"),
        test_dataset=samples.rows("test"),
        data_collator=collate,
        processing_class=tokenizer,
        metrics=metrics,
        generate=generate if config.predict_with_generate else None,
        describe_predictions=partial(_described, tokenizer=tokenizer) if config.predict_with_generate else None,
        predict_samples=partial(written, tokenizer=tokenizer, collate=collate, generate=generate),
        complete=answering(config, tokenizer, most_tokens=lengths.source),
    )


def _columns(config: TaskConfig, splits: Splits) -> Columns:
    first = splits.known[0]
    target = config.summary_column or "summary"
    strings = [name for name in first.string_columns if name != target]
    names = column_names(config) or (["text"] if "text" in strings else strings)
    if target in names:
        raise ConfigError(f"--text_column_names names {target!r}, the text to write; name the one to read.")
    if not config.text_column_names and len(names) != 1:
        raise ConfigError(
            f"{first.source}: which column holds the text to read? Of {', '.join(first.columns)}; give "
            "--text_column_names."
        )
    for split in splits.known:
        split.require_columns("text_column_names", *names)
        if split.name != "test":
            split.require_columns("summary_column", target)
        elif not config.predict_with_generate and target not in split.columns:
            raise ConfigError(
                f"{split.source} has no column {target!r} (--summary_column) to compute a loss with; "
                "add it, or give --predict_with_generate to have the texts written."
            )
    return Columns(source=names, target=target)


def _lengths(config: TaskConfig, tokenizer: Any, model_config: Any) -> Lengths:
    longest = longest_sequence(tokenizer, model_config)
    for flag in ("max_source_length", "max_target_length", "generation_max_length"):
        if (length := getattr(config, flag)) is not None:
            check_length(flag, length, tokenizer, model_config)
    target = config.max_target_length or min(longest, TARGET_LENGTH)
    return Lengths(
        source=config.max_source_length or min(longest, SOURCE_LENGTH),
        target=target,
        generated=config.generation_max_length or target,
    )


def _set_start(config: TaskConfig, model_config: Any, tokenizer: Any) -> None:
    """Set the token that a target begins with: for a new model the padding, as T5's, if its type has none."""
    if getattr(model_config, "decoder_start_token_id", None) is not None:
        return
    name = config.config_name or config.model_name_or_path
    if name is not None:
        raise ConfigError(
            f"The config of {name} has no decoder_start_token_id, the token that a text begins from; write it into "
            "config.json (often the padding's), or take an encoder-decoder model that has one."
        )
    model_config.decoder_start_token_id = tokenizer.pad_token_id


def _samples(split: Split, columns: Columns, tokenizer: Any, lengths: Lengths, config: TaskConfig) -> Split:
    """Tokenise a split, with its target texts if it has them."""
    given, prefix, delimiter = split.source, config.source_prefix or "", config.text_column_delimiter
    pads, has_target = config.pad_to_max_length, columns.target in split.columns

    def tokenised(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        texts = [prefix + text for text in texts_of(batch, columns.source, delimiter)]
        padding = "max_length" if pads else False
        samples = dict(tokenizer(texts, padding=padding, max_length=lengths.source, truncation=True))
        require_tokens(samples, texts)
        if has_target:
            targets = batch[columns.target]
            if None in targets:
                raise ConfigError(
                    f"{given} has rows without a value in {columns.target!r}; give each one or remove them."
                )
            texts = [as_text(text, columns.target) for text in targets]
            ids = tokenizer(text_target=texts, max_length=lengths.target, truncation=True)["input_ids"]
            require_tokens({"input_ids": ids}, texts)
            samples["labels"] = [row + [IGNORED] * (lengths.target - len(row)) for row in ids] if pads else ids
        return samples

    return split.transform(tokenised, config)


def _collated(samples: list[Any], *, pad: Any) -> dict[str, Any]:
    """Return a batch; without target texts it has no labels, where Transformers' collator would give None."""
    return {name: value for name, value in pad(samples).items() if value is not None}


def _generator(config: TaskConfig, lengths: Lengths) -> Any:
    options: dict[str, Any] = {"max_length": lengths.generated}
    if config.generation_num_beams is not None:
        options["num_beams"] = config.generation_num_beams

    def generate(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name not in OF_THE_TARGET}
        # The training has switched the cache off in the model's config.
        tokens: torch.Tensor = model.generate(**inputs, **options, use_cache=True)
        return tokens

    return generate


def _described(predictions: npt.NDArray[Any], *, tokenizer: Any) -> list[str]:
    """Return a line for each text."""
    return [" ".join(text.splitlines()) for text in decoded(predictions.tolist(), tokenizer)]
