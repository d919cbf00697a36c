"""Scores computed batch by batch, each a `harness.tasks.Metrics`, with the values of sklearn and scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IGNORED = -100


class TokenAccuracy:
    """The share of correctly predicted tokens; `shift` is 1 where position i predicts token i + 1."""

    names: tuple[str, ...] = ("accuracy",)

    def __init__(self, *, shift: int) -> None:
        self._shift = shift
        self._counts: torch.Tensor | None = None  # correct tokens, all tokens

    def predictions(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Reduce (batch, length, vocabulary) to the likeliest token, (batch, length)."""
        return _logits(logits).argmax(dim=-1)

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch; labels of -100 don't count."""
        predictions = predictions[:, : predictions.shape[1] - self._shift]
        labels = labels[:, self._shift :]
        counted = labels != IGNORED
        counts = torch.stack([((predictions == labels) & counted).sum(), counted.sum()])
        self._counts = counts if self._counts is None else self._counts + counts

    def compute(self) -> dict[str, float]:
        """Return the accuracy; NaN where no token counted."""
        right, total = [0, 0] if self._counts is None else self._counts.tolist()
        return {"accuracy": right / total if total else math.nan}


class LabelScores:
    """Scores of one label out of many, from the counts of (true, predicted) pairs."""

    def __init__(self, names: Sequence[str], num_labels: int) -> None:
        self.names = _with_combined(names)
        self._wanted = tuple(names)
        self._num_labels = num_labels
        self._counts: torch.Tensor | None = None  # (labels * labels,)

    def predictions(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Reduce (batch, labels) to the likeliest label, (batch,)."""
        return _logits(logits).argmax(dim=-1)

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch of pairs; labels of -100 don't count."""
        pairs = (labels * self._num_labels + predictions)[labels != IGNORED]
        counts = torch.bincount(pairs, minlength=self._num_labels**2)
        self._counts = counts if self._counts is None else self._counts + counts

    def compute(self) -> dict[str, float]:
        """Return the scores; NaN where no label counted."""
        counts = [] if self._counts is None else self._counts.tolist()
        if not any(counts):
            return dict.fromkeys(self.names, math.nan)
        cells = np.nonzero(counts)[0]
        true, predicted = cells // self._num_labels, cells % self._num_labels
        weights = np.asarray(counts, dtype=np.float64)[cells]
        average = "binary" if self._num_labels == 2 else "macro"
        return _combined({name: _label_score(name, true, predicted, weights, average) for name in self._wanted})


class MultiLabelScores:
    """Scores of any number of labels a sample: micro averages, and the accuracy of the whole set."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = _with_combined(names)
        self._wanted = tuple(names)
        self._counts: torch.Tensor | None = None  # true positives, predicted, true, right samples, samples

    def predictions(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Reduce (batch, labels) to 1 where the label is likelier than not, else 0."""
        return (_logits(logits) > 0).to(torch.int8)

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch of 0/1 matrices, (batch, labels) each."""
        predicted, true = predictions > 0, labels > 0
        right = (predicted == true).all(dim=1).sum()
        samples = torch.full_like(right, len(labels))
        counts = torch.stack([(predicted & true).sum(), predicted.sum(), true.sum(), right, samples])
        self._counts = counts if self._counts is None else self._counts + counts

    def compute(self) -> dict[str, float]:
        """Return the scores; NaN where there was no sample."""
        if self._counts is None:
            return dict.fromkeys(self.names, math.nan)
        both, predicted, true, right, samples = self._counts.tolist()
        values = {
            "accuracy": right / samples,
            "f1": 2 * both / (predicted + true) if predicted + true else 0.0,
            "precision": both / predicted if predicted else 0.0,
            "recall": both / true if true else 0.0,
        }
        return _combined({name: values[name] for name in self._wanted})


class RegressionScores:
    """Scores of a number. Correlations need all pairs, so it grows by 8 bytes a sample."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = _with_combined(names)
        self._wanted = tuple(names)
        self._pairs: list[torch.Tensor] = []

    def predictions(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Reduce (batch, 1) to (batch,) in float32."""
        return _logits(logits).reshape(-1).float()

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """Keep a batch of pairs, (batch,) each."""
        self._pairs.append(torch.stack([predictions.float(), labels.reshape(-1).float()]))

    def compute(self) -> dict[str, float]:
        """Return the scores in float64; a correlation with a constant is NaN."""
        if not self._pairs:
            return dict.fromkeys(self.names, math.nan)
        predicted, true = torch.cat(self._pairs, dim=1).cpu().double().numpy()
        return _combined({name: _number_score(name, predicted, true) for name in self._wanted})


LABEL_METRICS = ("accuracy", "f1", "precision", "recall", "matthews_correlation")
MULTI_LABEL_METRICS = ("accuracy", "f1", "precision", "recall")
REGRESSION_METRICS = ("mse", "pearson", "spearmanr")


def _logits(output: Any) -> torch.Tensor:
    # Some models return hidden states or caches along with the logits, which come first.
    logits: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return logits


def _with_combined(names: Sequence[str]) -> tuple[str, ...]:
    return (*names, "combined_score") if len(names) > 1 else tuple(names)


def _combined(values: dict[str, float]) -> dict[str, float]:
    """Return the scores with their mean added if there are several, as GLUE reports it."""
    return {**values, "combined_score": sum(values.values()) / len(values)} if len(values) > 1 else values


def _label_score(
    name: str,
    true: npt.NDArray[np.int64],
    predicted: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float64],
    average: str,
) -> float:
    if name == "accuracy":
        return float(weights[true == predicted].sum() / weights.sum())
    import sklearn.metrics  # takes half a second

    if name == "matthews_correlation":
        if len({*true, *predicted}) < 2:
            return 0.0  # as sklearn, which also warns
        return float(sklearn.metrics.matthews_corrcoef(true, predicted, sample_weight=weights))
    score = getattr(sklearn.metrics, f"{name}_score")
    return float(score(true, predicted, sample_weight=weights, average=average, zero_division=0.0))


def _number_score(name: str, predicted: npt.NDArray[np.float64], true: npt.NDArray[np.float64]) -> float:
    if name == "mse":
        return float(np.mean((predicted - true) ** 2))
    if len(true) < 2 or not (np.ptp(predicted) > 0 and np.ptp(true) > 0):
        return math.nan
    import scipy.stats

    correlation = scipy.stats.pearsonr if name == "pearson" else scipy.stats.spearmanr
    return float(correlation(predicted, true).statistic)
