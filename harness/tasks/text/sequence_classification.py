"""Classification and regression of texts and pairs, as Transformers' run_classification and run_glue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, default_data_collator

from harness.config import choice
from harness.errors import ConfigError
from harness.tasks import Metrics, Task
from harness.tasks.flags import TaskConfig
from harness.tasks.labels import MULTI, REGRESSION, SINGLE, Labels, coded_names, read_labels, use_labels
from harness.tasks.predictions import classified
from harness.tasks.pretrained import (
    head_of,
    load_config,
    load_model,
    load_tokenizer,
    require_padding,
    sequence_length,
)
from harness.tasks.rows import load_splits
from harness.tasks.scores.classification import (
    LABEL_METRICS,
    MULTI_LABEL_METRICS,
    REGRESSION_METRICS,
    LabelScores,
    MultiLabelScores,
    RegressionScores,
)
from harness.tasks.splits import Split, Splits, column_names, require_tokens, texts_of
from harness.tasks.text.glue import GLUE, with_glue

DEFAULT_LENGTH = 128
RAW_LABEL = "label as read"


def build(config: TaskConfig) -> Task:
    """
    Read labelled texts, learn the labels from the training data and load or make the model.

    A sample holds the tokenizer's keys and, except in data to predict on, "label": an id, a float, or a 0.0 or 1.0 for
    each label. Raises ConfigError for input that the user can correct.
    """
    config = with_glue(config)
    splits = load_splits(config)
    splits.to_learn_labels()
    labels_from = splits.label_column(config)
    columns = _text_columns(config, splits, labels_from)
    tokenizer = load_tokenizer(config)
    require_padding(tokenizer)
    model_config = load_config(config, tokenizer)
    length = sequence_length(config, tokenizer, model_config, default=DEFAULT_LENGTH)
    labels = read_labels(splits, labels_from, config.do_regression)
    labels = use_labels(labels, model_config, **head_of(config, model_config, AutoModelForSequenceClassification))
    metrics = _metrics(config, labels)
    if model_config.pad_token_id is None:
        model_config.pad_token_id = tokenizer.pad_token_id
    tokenise = _tokeniser(config, columns, tokenizer, length)
    texts = splits.hold_out(config, shuffled=True).cut(config)
    samples = texts.map(lambda split: _samples(split, labels, tokenise, config), "validation_mismatched")
    eval_dataset = samples.rows("validation")
    if "validation_mismatched" in samples:
        eval_dataset = {"mnli": eval_dataset, "mnli-mm": samples.rows("validation_mismatched")}
    collate = default_data_collator if config.pad_to_max_length else DataCollatorWithPadding(tokenizer)
    return Task(
        model=load_model(config, AutoModelForSequenceClassification, model_config, tokenizer),
        train_dataset=samples.rows("train"),
        eval_dataset=eval_dataset,
        test_dataset=samples.rows("test"),
        data_collator=collate,
        processing_class=tokenizer,
        metrics=metrics,
        describe_predictions=labels.describe,
        predict_samples=partial(classified, tokenizer=tokenizer, collate=collate, labels=labels),
    )


def _text_columns(config: TaskConfig, splits: Splits, labels_from: str) -> list[str]:
    train = splits["train"]
    strings = [name for name in train.string_columns if name != labels_from]
    if config.text_column_names:
        columns = column_names(config)
    elif {"sentence1", "sentence2"} <= set(strings):
        columns = ["sentence1", "sentence2"]
    elif "text" in strings or "sentence" in strings:
        columns = ["text" if "text" in strings else "sentence"]
    elif 1 <= len(strings) <= 2:
        columns = strings
    else:
        present = ", ".join(train.columns)
        raise ConfigError(
            f"{train.source}: which of its columns hold the text? They are: {present}; give --text_column_names."
        )
    if labels_from in columns:
        raise ConfigError(f"--text_column_names names {labels_from!r}, which holds the labels; name the texts' column.")
    for split in splits.known:
        split.require_columns("text_column_names", *columns)
    return columns


def _metrics(config: TaskConfig, labels: Labels) -> Callable[[], Metrics]:
    known, default = {
        SINGLE: (LABEL_METRICS, "accuracy"),
        MULTI: (MULTI_LABEL_METRICS, "f1"),
        REGRESSION: (REGRESSION_METRICS, "mse"),
    }[labels.kind]
    names: tuple[str, ...] = (config.metric_name or default,)
    if config.task_name and config.metric_name is None:
        names = GLUE[config.task_name].metrics
    for name in names:
        choice("metric_name", name, known)
    if labels.kind == SINGLE:
        return lambda: LabelScores(names, len(labels.names))
    return lambda: MultiLabelScores(names) if labels.kind == MULTI else RegressionScores(names)


def _tokeniser(
    config: TaskConfig, columns: Sequence[str], tokenizer: Any, length: int
) -> Callable[[Mapping[str, Sequence[Any]]], dict[str, Any]]:
    padding = "max_length" if config.pad_to_max_length else False
    delimiter = config.text_column_delimiter

    def tokenise(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        texts = (
            [texts_of(batch, [column], "") for column in columns]
            if len(columns) == 2
            else [texts_of(batch, columns, delimiter)]
        )
        samples = dict(tokenizer(*texts, padding=padding, max_length=length, truncation=True))
        require_tokens(samples, *texts)
        return samples

    return tokenise


def _samples(
    split: Split, labels: Labels, tokenise: Callable[[Mapping[str, Sequence[Any]]], dict[str, Any]], config: TaskConfig
) -> Split:
    """Tokenise a split, with its labels as numbers; the split to predict on has none."""
    if split.name == "test":
        return split.transform(tokenise, config)
    given, coded = split.source, coded_names(split.rows, labels.column)
    # `datasets` would cast the ids to the type of an existing column of the same name.
    renamed = replace(split, rows=split.rows.rename_column(labels.column, RAW_LABEL))

    def labelled(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        return {**tokenise(batch), "label": labels.encode(batch[RAW_LABEL], coded, given)}

    return renamed.transform(labelled, config)
