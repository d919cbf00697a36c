"""Labels for the words of a text (named entities, parts of speech), as Transformers' run_ner."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy.typing as npt
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from harness.errors import ConfigError
from harness.tasks import Metrics, Task
from harness.tasks.flags import TaskConfig
from harness.tasks.labels import Labels, coded_names, read_tags, use_labels
from harness.tasks.predictions import tagged
from harness.tasks.pretrained import (
    head_of,
    load_config,
    load_model,
    load_tokenizer,
    require_padding,
    sequence_length,
)
from harness.tasks.rows import load_splits
from harness.tasks.scores.classification import TokenAccuracy
from harness.tasks.scores.entities import IGNORED, EntityScores, are_of_entities
from harness.tasks.splits import Split, Splits, column_names, require_tokens

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 512
# Tokenizers of these models treat a word as the start of a text, unless told to put a space before it.
NEED_PREFIX_SPACE = ("bloom", "deberta", "gpt2", "roberta")
Tokenise = Callable[[Sequence[Sequence[str]]], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of the words and of their labels, lists of the same length."""

    words: str
    labels: str


def build(config: TaskConfig) -> Task:
    """
    Read words with a label each, learn the labels from the training data and load or make the model.

    A sample holds the tokenizer's keys and "labels", (tokens,): an id at the first token of a word, -100 elsewhere, or
    with --label_all_tokens an id at each token of a word. Test data may lack labels. Raises ConfigError for input that
    the user can correct.
    """
    splits = load_splits(config)
    train = splits.to_learn_labels()
    columns = _columns(config, splits)
    tokenizer, model_config = _tokenizer_and_config(config)
    labels = _labels(config, train, columns, model_config)
    tokenise = _tokeniser(config, tokenizer, sequence_length(config, tokenizer, model_config, default=DEFAULT_LENGTH))
    words = splits.hold_out(config).cut(config)
    samples = words.map(lambda split: _samples(split, columns, labels, tokenise, config))
    return Task(
        model=load_model(config, AutoModelForTokenClassification, model_config, tokenizer),
        train_dataset=samples.rows("train"),
        eval_dataset=samples.rows("validation"),
        test_dataset=samples.rows("test"),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        metrics=_metrics(labels),
        describe_predictions=partial(
            _described, rows=words.rows("test") or (), column=columns.words, labels=labels, tokenise=tokenise
        ),
        predict_samples=partial(
            tagged, tokenizer=tokenizer, collate=DataCollatorForTokenClassification(tokenizer), names=labels.names
        ),
    )


def _tokenizer_and_config(config: TaskConfig) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(config)
    model_config = load_config(config, tokenizer)
    if model_config.model_type in NEED_PREFIX_SPACE:
        tokenizer = load_tokenizer(config, add_prefix_space=True)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"The tokenizer {tokenizer.name_or_path} can't tell which word a token is of, which token-classification "
            "needs; give one that is fast (a tokenizer.json) by --tokenizer_name."
        )
    require_padding(tokenizer)
    tokenizer.padding_side = "right"  # predictions then have their tokens' positions in every batch
    if model_config.pad_token_id is None:
        model_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model_config


def _columns(config: TaskConfig, splits: Splits) -> Columns:
    words = column_names(config) or ["tokens"]
    if len(words) > 1:
        raise ConfigError(
            f"--text_column_names={config.text_column_names}: token-classification reads one column, of lists of "
            "words; name one."
        )
    columns = Columns(words=words[0], labels=config.label_column_name or "ner_tags")
    for split in splits.known:
        split.require_columns("text_column_names", columns.words)
        if split.name != "test":
            split.require_columns("label_column_name", columns.labels)
        value = split.first_row()[columns.words]
        if not isinstance(value, list):
            raise ConfigError(
                f"{split.source}: column {columns.words!r} holds no lists of words but {value!r}; name another column "
                "by --text_column_names, and use json, jsonl or parquet: other files have no lists."
            )
    return columns


def _labels(config: TaskConfig, train: Split, columns: Columns, model_config: Any) -> Labels:
    labels = read_tags(train, columns.labels)
    problem_type = model_config.problem_type
    labels = use_labels(labels, model_config, **head_of(config, model_config, AutoModelForTokenClassification))
    model_config.problem_type = problem_type  # only for classifiers of whole texts
    return labels


def _metrics(labels: Labels) -> Callable[[], Metrics]:
    if are_of_entities(labels.names):
        return lambda: EntityScores(labels.names)
    logger.info(
        "The labels (%s, ...) do not begin with B-, I- and so on, so there are no entities to score: accuracy alone.",
        ", ".join(labels.names[:3]),
    )
    return lambda: TokenAccuracy(shift=0)


def _tokeniser(config: TaskConfig, tokenizer: Any, length: int) -> Tokenise:
    padding = "max_length" if config.pad_to_max_length else False

    def tokenise(words: Sequence[Sequence[str]]) -> Any:
        return tokenizer(list(words), padding=padding, truncation=True, max_length=length, is_split_into_words=True)

    return tokenise


def _samples(split: Split, columns: Columns, labels: Labels, tokenise: Tokenise, config: TaskConfig) -> Split:
    """Tokenise a split, with the labels of its words if it has them."""
    given = split.source
    coded, inside = coded_names(split.rows, columns.labels), _inside(labels.names)
    is_labelled, label_all = columns.labels in split.columns, config.label_all_tokens

    def labelled(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        _check_words(batch[columns.words], given)
        tokens = tokenise(batch[columns.words])
        samples = dict(tokens)
        if is_labelled:
            ids = []
            for words, tags in zip(batch[columns.words], batch[columns.labels], strict=True):
                if tags is None or len(tags) != len(words):
                    raise ConfigError(
                        f"{given} has {len(words)} words and {len(tags or ())} labels in a row ({' '.join(words)!r}); "
                        "give each word a label."
                    )
                ids.append(labels.encode(tags, coded, given))
            samples["labels"] = [
                _of_tokens(row, tokens.word_ids(index), inside if label_all else None) for index, row in enumerate(ids)
            ]
            labelled_tokens = [[int(label != IGNORED) for label in row] for row in samples["labels"]]
            require_tokens({"attention_mask": labelled_tokens}, batch[columns.words])
        return samples

    return split.transform(labelled, config)


def _check_words(rows: Sequence[Any], given: str) -> None:
    for words in rows:
        if words is None or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"{given} has a row whose words are no texts ({words!r}); correct or remove it.")
        if not words:
            raise ConfigError(f"{given} has a row without words, of which nothing can be learnt; remove it.")


def _inside(names: Sequence[str]) -> list[int]:
    """Return each label's counterpart for a word's further tokens: I-X for B-X if there is one, else itself."""
    ids = {name: index for index, name in enumerate(names)}
    return [ids.get(f"I-{name[2:]}", index) if name.startswith("B-") else index for index, name in enumerate(names)]


def _of_tokens(labels: Sequence[int], words: Sequence[int | None], inside: Sequence[int] | None) -> list[int]:
    """Return the label of each token; `words` holds the index of its word, None for a special token."""
    before = [None, *words]
    found = []
    for word, last in zip(words, before, strict=False):
        if word is None:
            found.append(IGNORED)
        elif word != last:
            found.append(labels[word])
        else:
            found.append(IGNORED if inside is None else inside[labels[word]])
    return found


def _described(
    predictions: npt.NDArray[Any], *, rows: Any, column: str, labels: Labels, tokenise: Tokenise
) -> list[str]:
    """Return a line for each text: the predicted labels of its words, each from the word's first token."""
    lines = []
    for row, predicted in zip(rows, predictions, strict=True):
        numbers = range(len(row[column]))
        words = _of_tokens(numbers, tokenise([row[column]]).word_ids(0), None)
        lines.append(" ".join(labels.names[predicted[place]] for place, word in enumerate(words) if word != IGNORED))
    return lines
