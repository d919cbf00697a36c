"""Labels of texts: find their kind and names in the training data, and convert them to numbers and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import ConfigError
from harness.tasks.splits import Split

REGRESSION = "regression"
SINGLE = "single_label_classification"
MULTI = "multi_label_classification"


@dataclass(frozen=True)
class Labels:
    """
    The column of the labels, their kind and their names in the order of the ids.

    The kind is that of a model config's `problem_type`. `coded` holds a ClassLabel's names: the column then has indices
    of these in place of labels.
    """

    column: str
    kind: str
    names: tuple[str, ...] = ()
    coded: tuple[str, ...] = ()

    def encode(self, values: Sequence[Any], coded: Sequence[str], given: str) -> list[Any]:
        """
        Convert a column into what the loss takes: floats, ids, or a 0.0/1.0 a label.

        `coded` is as above for the data `given`. Raises ConfigError for labels that the training data lacks.
        """
        if self.kind == REGRESSION:
            return [_number(value, self.column, given) for value in values]
        ids = {name: index for index, name in enumerate(self.names)}
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


def read_labels(split: Split, column: str, do_regression: bool | None) -> Labels:
    """
    Find kind and names of the labels in the training data.

    The names are a ClassLabel's, else the sorted values of the column. Floats mean regression unless `do_regression` is
    False; lists mean any number of labels a sample. Raises ConfigError for samples without a label.
    """
    dataset, given = split.rows, split.source
    values = dataset.select_columns([column])
    first = next((row[column] for row in values if row[column] is not None), None)
    if isinstance(first, Mapping):
        raise ConfigError(
            f"{given}: column {column!r} holds mappings; a label is a text, a number or a list of them. "
            "Name another column by --label_column_name."
        )
    if isinstance(first, list):
        found = {label for row in values for label in row[column] or ()}
        kind = MULTI
        if not found:
            raise ConfigError(f"{given} has no label in any row of {column!r}; give data with labels.")
    elif do_regression or (do_regression is None and isinstance(first, float)):
        return Labels(column, REGRESSION)
    else:
        try:
            found = set(dataset.unique(column)) if hasattr(dataset, "unique") else {row[column] for row in values}
        except NotImplementedError as error:  # from pyarrow, for a column of several types
            reason = f"{given}: column {column!r} holds values of several types"
            raise ConfigError(f"{reason}; write all labels as texts, or all as numbers.") from error
        kind = SINGLE
    coded = coded_names(dataset, column)
    for label in found:
        _name(label, coded, column, given)  # raises ConfigError for one that is none
    return Labels(column, kind, coded or tuple(str(label) for label in _sorted(found)), coded)


def use_labels(labels: Labels, model_config: Any, *, pretrained: bool) -> Labels:
    """
    Write the labels into the model's config, and return them in the order of their ids there.

    A pretrained model that has the same names keeps its order: its head was trained with it.
    """
    if labels.kind != REGRESSION:
        theirs = dict(model_config.id2label or {}) if pretrained else {}
        if set(theirs.values()) == set(labels.names) and set(theirs) == set(range(len(labels.names))):
            labels = dataclasses.replace(labels, names=tuple(theirs[index] for index in sorted(theirs)))
        model_config.num_labels = len(labels.names)
        model_config.id2label = dict(enumerate(labels.names))
        model_config.label2id = {name: index for index, name in enumerate(labels.names)}
    else:
        model_config.num_labels = 1
    model_config.problem_type = labels.kind
    return labels


def coded_names(dataset: Any, column: str) -> tuple[str, ...]:
    """Return the names of a ClassLabel column, or of one with lists of them; empty for other columns."""
    feature = (dataset.features or {}).get(column)
    feature = getattr(feature, "feature", feature)
    return tuple(getattr(feature, "names", None) or ())


def _sorted(labels: Iterable[Any]) -> list[Any]:
    return sorted(labels, key=lambda label: (isinstance(label, str), label))


def _name(value: Any, coded: Sequence[str], column: str, given: str) -> str:
    if value is None or (coded and value == -1):
        raise _missing(column, given)
    return coded[value] if coded else str(value)


def _number(value: Any, column: str, given: str) -> float:
    if value is None:
        raise _missing(column, given)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{given} has {value!r} in {column!r}, no number; correct it, or leave --do_regression out."
        ) from error
    if not math.isfinite(number):
        raise ConfigError(f"{given} has {value!r} in {column!r}, which no loss can use; correct or remove the row.")
    return number


def _missing(column: str, given: str) -> ConfigError:
    return ConfigError(f"{given} has rows without a value in {column!r}; give each a label or remove them.")
