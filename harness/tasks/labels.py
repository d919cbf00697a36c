"""Labels of texts: find their kind and names in the training data, and convert them to numbers and back."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import ConfigError
from harness.tasks.delimited import is_number, is_whole
from harness.tasks.splits import Split, Splits

logger = logging.getLogger(__name__)

REGRESSION = "regression"
SINGLE = "single_label_classification"
MULTI = "multi_label_classification"


@dataclass(frozen=True)
class Labels:
    """
    The column of the labels, their kind and their names in the order of the ids.

    The kind is that of a model config's `problem_type`. `coded` holds the names that whole numbers in the column stand
    for, a ClassLabel's or those of a trained model. With `one_hot` a row has a 0 or 1 for each label.
    """

    column: str
    kind: str
    names: tuple[str, ...] = ()
    coded: tuple[str, ...] = ()
    one_hot: bool = False

    def encode(self, values: Sequence[Any], coded: Sequence[str], given: str) -> list[Any]:
        """
        Convert a column into what the loss takes: floats, ids, or a 0.0/1.0 a label.

        `coded` are the names of a ClassLabel in the data `given`, if it has one. Raises ConfigError for labels that
        the training data lacks.
        """
        if self.kind == REGRESSION:
            return [_number(value, self.column, given) for value in values]
        if self.one_hot:
            return [self._flags(row, given) for row in values]
        ids = {name: index for index, name in enumerate(self.names)}
        coded = coded or self.coded
        if self.kind == SINGLE:
            return [self._id(value, coded, ids, given) for value in values]
        chosen = [{self._id(label, coded, ids, given) for label in value or ()} for value in values]
        return [[float(index in row) for index in range(len(ids))] for row in chosen]

    def describe(self, predictions: npt.NDArray[Any]) -> list[str]:
        """Return predictions, reduced by a score or raw logits, as the lines of a table."""
        if self.kind == REGRESSION:
            cells = [f"{value:3.3f}" for value in predictions.reshape(-1)]
        elif self.kind == MULTI:
            # A score's 1 and a logit above 0 both stand for a label.
            cells = [str([self.names[index] for index in np.flatnonzero(row > 0)]) for row in predictions]
        else:
            ids = predictions.argmax(axis=-1) if predictions.ndim > 1 else predictions
            cells = [self.names[index] for index in ids]
        return ["index\tprediction", *(f"{index}\t{cell}" for index, cell in enumerate(cells))]

    def _id(self, value: Any, coded: Sequence[str], ids: dict[str, int], given: str) -> int:
        name = _name(value, coded, self.column, given)
        if name not in ids:
            known = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
            raise ConfigError(
                f"{given} has the label {name!r}, which no training sample has (they have: {known}); "
                "add such samples to the training data or remove it here."
            )
        return ids[name]

    def _flags(self, row: Any, given: str) -> list[float]:
        if row is None:
            raise _missing(self.column, given)
        if len(row) != len(self.names) or any(value not in (0, 1) for value in row):
            raise ConfigError(
                f"{given} has {row!r} in {self.column!r}, and the training data a 0 or 1 for each of "
                f"{len(self.names)} labels; correct or remove the row."
            )
        return [float(value) for value in row]


def read_labels(splits: Splits, column: str, do_regression: bool | None) -> Labels:
    """
    Find kind and names of the labels: the names in the training data, the kind once for all parts with labels.

    The names are a ClassLabel's, else the sorted values of the column. Numbers with a fraction mean regression unless
    `do_regression` is False. Lists mean any number of labels a sample; lists of as many 0s and 1s a sample have one
    for each label. Raises ConfigError for samples without a label and for values that are no labels.
    """
    train = splits["train"]
    dataset, given = train.rows, train.source
    coded = coded_names(dataset, column)
    first = next((row[column] for row in dataset.select_columns([column]) if row[column] is not None), None)
    if not isinstance(first, str | int | float | list | None):
        raise _no_label(first, column, given)
    if isinstance(first, list):
        return _of_lists(train, column, coded)
    if do_regression or (do_regression is None and isinstance(first, float) and not train.is_delimited):
        return Labels(column, REGRESSION)
    found = _unique(train, column)
    for label in found:
        _name(label, coded, column, given)  # raises ConfigError for one that is none
    if do_regression is None and not coded and _are_measures(found, splits, column):
        return Labels(column, REGRESSION)
    return Labels(column, SINGLE, coded or tuple(_spelt(label) for label in _sorted(found, train)), coded)


def read_tags(train: Split, column: str) -> Labels:
    """
    Find the names of the labels of words, lists of texts or whole numbers in a column of the training data.

    Raises ConfigError for a column of anything else.
    """
    found: set[Any] = set()
    for row in train.rows.select_columns([column]):
        if not isinstance(row[column], list | None):
            raise ConfigError(
                f"{train.source}: column {column!r} holds no lists of labels, one a word; name another column by "
                "--label_column_name."
            )
        found |= _set_of(row[column] or (), column, train.source)
    if not found:
        raise ConfigError(f"{train.source} has no label in any row of {column!r}; give data with labels.")
    coded = coded_names(train.rows, column)
    for label in found:
        _name(label, coded, column, train.source)
        if isinstance(label, float):
            raise ConfigError(f"{train.source} has {label!r} in {column!r}; a label is a text or a whole number.")
    return Labels(column, SINGLE, coded or tuple(_spelt(label) for label in _sorted(found, train)), coded)


def use_labels(labels: Labels, model_config: Any, *, pretrained: bool, trained_head: bool = False) -> Labels:
    """
    Write the labels into the model's config, and return them in the order of their ids there.

    A pretrained model that knows all of them keeps its labels, their ids and so its head. With a `trained_head` whole
    numbers are its ids, where it has them all. Raises ConfigError for a single class, of which nothing can be learnt.
    """
    if labels.kind != REGRESSION:
        theirs = dict(model_config.id2label or {}) if pretrained else {}
        labels = _as_the_model(labels, theirs, trained_head)
        if labels.kind == SINGLE and len(labels.names) < 2:
            raise ConfigError(
                f"Column {labels.column!r} of the training data has no label but {labels.names[0]!r}; a classifier "
                "needs two or more."
            )
        model_config.num_labels = len(labels.names)
        model_config.id2label = dict(enumerate(labels.names))
        model_config.label2id = {name: index for index, name in enumerate(labels.names)}
    else:
        model_config.num_labels = 1
    model_config.problem_type = labels.kind
    return labels


def _as_the_model(labels: Labels, theirs: Mapping[int, str], trained_head: bool) -> Labels:
    if not theirs or set(theirs) != set(range(len(theirs))):
        return labels
    names = tuple(theirs[index] for index in range(len(theirs)))
    are_numbers = not labels.coded and all(map(is_whole, labels.names)) and not any(map(is_whole, names))
    if labels.one_hot:
        return dataclasses.replace(labels, names=names) if trained_head and len(names) == len(labels.names) else labels
    if set(labels.names) <= set(names) and len(set(names)) == len(names):
        return dataclasses.replace(labels, names=names)
    if trained_head and are_numbers and {int(name) for name in labels.names} <= set(theirs):
        return dataclasses.replace(labels, names=names, coded=names)
    if trained_head:
        logger.warning(
            "The head of the model was trained for the labels %s; it is trained further for %s.",
            *(_few(names), _few(labels.names)),
        )
    return labels


def _of_lists(train: Split, column: str, coded: tuple[str, ...]) -> Labels:
    found: set[Any] = set()
    lengths: set[int] = set()
    for row in train.rows.select_columns([column]):
        labels = row[column] or ()
        found |= _set_of(labels, column, train.source)
        lengths.add(len(labels))
    if not found:
        raise ConfigError(f"{train.source} has no label in any row of {column!r}; give data with labels.")
    if not coded and found <= {0, 1} and len(lengths) == 1 and lengths != {1}:
        return Labels(column, MULTI, tuple(map(str, range(*lengths))), one_hot=True)
    for label in found:
        _name(label, coded, column, train.source)
        if isinstance(label, float):
            raise ConfigError(
                f"{train.source} has lists of numbers like {label!r} in {column!r}; give lists of labels, or a 0 or 1 "
                "for each label, as many in each row."
            )
    return Labels(column, MULTI, coded or tuple(_spelt(label) for label in _sorted(found, train)), coded)


def _set_of(labels: Sequence[Any], column: str, given: str) -> set[Any]:
    try:
        return set(labels)
    except TypeError as error:  # lists or mappings within the list
        raise _no_label(labels[0], column, given) from error


def _unique(split: Split, column: str) -> set[Any]:
    rows = split.rows
    try:
        return set(rows.unique(column)) if hasattr(rows, "unique") else {row[column] for row in rows}
    except NotImplementedError as error:  # from pyarrow, for a column of several types
        reason = f"{split.source}: column {column!r} holds values of several types"
        raise ConfigError(f"{reason}; write all labels as texts, or all as numbers.") from error
    except TypeError as error:  # a mapping
        raise _no_label("a mapping", column, split.source) from error


def _are_measures(found: set[Any], splits: Splits, column: str) -> bool:
    """
    Whether the labels are numbers of which some have a fraction, and so are to be estimated and no classes.

    `1.0` is written as such a number; in the other parts, where a whole number may have been written so, only what
    lies between two whole numbers counts.
    """
    if not all(_is_numeric(label, splits["train"]) for label in found):
        return False
    if any(isinstance(label, float) or (isinstance(label, str) and not is_whole(label)) for label in found):
        return True
    others = (split for split in splits.labelled if split.name != "train" and column in split.columns)
    return any(
        _is_numeric(label, split) and float(label) % 1 > 0 for split in others for label in _unique(split, column)
    )


def _is_numeric(label: Any, split: Split) -> bool:
    if isinstance(label, str):
        return split.is_delimited and is_number(label)
    return isinstance(label, int | float) and not isinstance(label, bool)


def coded_names(dataset: Any, column: str) -> tuple[str, ...]:
    """Return the names of a ClassLabel column, or of one with lists of them; empty for other columns."""
    feature = (dataset.features or {}).get(column)
    feature = getattr(feature, "feature", feature)
    return tuple(getattr(feature, "names", None) or ())


def _sorted(labels: Iterable[Any], split: Split) -> list[Any]:
    labels = list(labels)
    if split.is_delimited and all(is_number(label) for label in labels):
        return sorted(labels, key=lambda label: (float(label), label))
    return sorted(labels, key=lambda label: (isinstance(label, str), label))


def _name(value: Any, coded: Sequence[str], column: str, given: str) -> str:
    if value is None or value == "" or (coded and value == -1):
        raise _missing(column, given)
    if not isinstance(value, str | int | float):
        raise _no_label(value, column, given)
    if not coded or (isinstance(value, str) and (value in coded or not is_whole(value))):
        return _spelt(value)
    return coded[int(value)] if 0 <= int(value) < len(coded) else _spelt(value)


def _spelt(label: Any) -> str:
    """Return a label as a name: texts and numbers as they are, true and false as JSON has them."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _number(value: Any, column: str, given: str) -> float:
    if value is None:
        raise _missing(column, given)
    try:
        number = float(value if not isinstance(value, str) or "_" not in value else "")  # Python takes 1_000
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{given} has {value!r} in {column!r}, no number; correct it, or leave --do_regression out."
        ) from error
    if not math.isfinite(number):
        raise ConfigError(f"{given} has {value!r} in {column!r}, which no loss can use; correct or remove the row.")
    return number


def _missing(column: str, given: str) -> ConfigError:
    return ConfigError(f"{given} has rows without a value in {column!r}; give each a label or remove them.")


def _no_label(value: Any, column: str, given: str) -> ConfigError:
    return ConfigError(
        f"{given}: column {column!r} holds {value!r} ({type(value).__name__}); a label is a text, a number or a list "
        "of them. Name another column by --label_column_name."
    )
