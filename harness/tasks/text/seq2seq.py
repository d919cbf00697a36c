"""From one text to another (summaries, translations), as Transformers' run_summarization and run_translation."""

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
from harness.tasks.rows import (
    SPLITS,
    column_names,
    columns_of,
    cut,
    hold_out,
    joined,
    load_splits,
    require_columns,
    source,
    string_columns,
    transform,
)
from harness.tasks.scores.classification import IGNORED, TokenAccuracy
from harness.tasks.scores.generated import TextScores, decoded

# The example scripts' defaults.
SOURCE_LENGTH, TARGET_LENGTH = 1024, 128
OF_THE_TARGET = ("labels", "decoder_input_ids", "decoder_attention_mask")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of the text to read, joined where there are several, and of the one to write."""

    source: Sequence[str]
    target: str


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The most tokens of a text to read, of one to learn to write, and of one that is written."""

    source: int
    target: int
    generated: int


def build(config: TaskConfig) -> Task:
    """
    Read pairs of texts and load or make an encoder-decoder model.

    A sample holds the tokenizer's keys of the first text and "labels", (tokens,) of the second; test data may lack
    the second with --predict_with_generate. Raises ConfigError for input that the user can put right.
    """
    splits = load_splits(config)
    columns = _columns(config, splits)
    tokenizer = load_tokenizer(config)
    require_padding(tokenizer)
    model_config = load_config(config, tokenizer)
    _set_start(config, model_config, tokenizer)
    lengths = _lengths(config, tokenizer, model_config)
    metrics = partial(TextScores, tokenizer) if config.predict_with_generate else partial(TokenAccuracy, shift=0)
    metrics()  # refuses what is not installed, before the model is loaded
    limits = {"train": config.max_train_samples, "validation": config.max_eval_samples}
    limits["test"] = config.max_predict_samples
    samples = {
        name: _samples(cut(part, limits[name]), columns, tokenizer, lengths, config, name)
        for name, part in hold_out(splits, config).items()
        if name in SPLITS
    }
    model = load_model(config, AutoModelForSeq2SeqLM, model_config, tokenizer)
    collate = partial(_collated, pad=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED))
    generate = _generator(config, lengths)
    return Task(
        model=model,
        train_dataset=samples.get("train"),
        eval_dataset=samples.get("validation"),
        test_dataset=samples.get("test"),
        data_collator=collate,
        processing_class=tokenizer,
        metrics=metrics,
        generate=generate if config.predict_with_generate else None,
        describe_predictions=partial(_described, tokenizer=tokenizer) if config.predict_with_generate else None,
        predict_samples=partial(written, tokenizer=tokenizer, collate=collate, generate=generate),
    )


def _columns(config: TaskConfig, splits: Mapping[str, Any]) -> Columns:
    first = next(split for split in SPLITS if split in splits)
    given = source(config, first)
    target = config.summary_column or "summary"
    strings = [name for name in string_columns(splits[first], given) if name != target]
    names = column_names(config) or (["text"] if "text" in strings else strings)
    if target in names:
        raise ConfigError(f"--text_column_names names {target!r}, the text to write; name the one to read.")
    if not config.text_column_names and len(names) != 1:
        present = ", ".join(columns_of(splits[first], given))
        raise ConfigError(f"{given}: which column holds the text to read? Of {present}; give --text_column_names.")
    for split in SPLITS:
        if split in splits:
            require_columns("text_column_names", names, splits[split], source(config, split))
            if split != "test":
                require_columns("summary_column", [target], splits[split], source(config, split))
            elif not config.predict_with_generate and target not in columns_of(splits[split], source(config, split)):
                raise ConfigError(
                    f"{source(config, split)} has no column {target!r} (--summary_column) to compute a loss with; "
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
    """See to the token that a text begins from: a new model's is the padding, as T5's, where its type has none."""
    if getattr(model_config, "decoder_start_token_id", None) is not None:
        return
    name = config.config_name or config.model_name_or_path
    if name is not None:
        raise ConfigError(
            f"The config of {name} has no decoder_start_token_id, the token that a text begins from; write it into "
            "config.json (often the padding's), or take an encoder-decoder model that has one."
        )
    model_config.decoder_start_token_id = tokenizer.pad_token_id


def _samples(rows: Any, columns: Columns, tokenizer: Any, lengths: Lengths, config: TaskConfig, split: str) -> Any:
    """Tokenise a split, with the texts to write if it has them."""
    given, prefix, pads = source(config, split), config.source_prefix or "", config.pad_to_max_length
    present = columns_of(rows, given)
    has_target = columns.target in present

    def tokenised(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        texts = [prefix + text for text in joined(batch, columns.source, config.text_column_delimiter)]
        padding = "max_length" if pads else False
        samples = dict(tokenizer(texts, padding=padding, max_length=lengths.source, truncation=True))
        if has_target:
            targets = batch[columns.target]
            if None in targets:
                raise ConfigError(
                    f"{given} has rows without a value in {columns.target!r}; give each one or remove them."
                )
            ids = tokenizer(text_target=[str(text) for text in targets], max_length=lengths.target, truncation=True)[
                "input_ids"
            ]
            samples["labels"] = [row + [IGNORED] * (lengths.target - len(row)) for row in ids] if pads else ids
        return samples

    return transform(rows, tokenised, config, remove=present)


def _collated(samples: list[Any], *, pad: Any) -> dict[str, Any]:
    """A batch; without texts to write it has no labels, where Transformers' collator has None."""
    return {name: value for name, value in pad(samples).items() if value is not None}


def _generator(config: TaskConfig, lengths: Lengths) -> Any:
    options: dict[str, Any] = {"max_length": lengths.generated}
    if config.generation_num_beams is not None:
        options["num_beams"] = config.generation_num_beams

    def generate(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name not in OF_THE_TARGET}
        # The training has turned the cache off in the model's config.
        tokens: torch.Tensor = model.generate(**inputs, **options, use_cache=True)
        return tokens

    return generate


def _described(predictions: npt.NDArray[Any], *, tokenizer: Any) -> list[str]:
    """A line a text."""
    return [" ".join(text.splitlines()) for text in decoded(predictions.tolist(), tokenizer)]
