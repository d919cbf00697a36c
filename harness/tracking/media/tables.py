"""Tables of predictions on the first samples of the evaluation sets, and what W&B shows of them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch

from harness.tasks import PredictSamples, SamplePredictions
from harness.training import rng

logger = logging.getLogger(__name__)

TABLE, MATRIX, CURVES = "sample_predictions", "confusion_matrix", "pr_curve"
MODES = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")


class SampleTables:
    """
    Rank zero, or all if the model is sharded: what it makes of the first `num_samples` of each evaluation set.

    A single set has the table `sample_predictions`, each set of a mapping its own, `sample_predictions_<name>`; the
    charts likewise. The samples are read once, at the first table, by iterators of their own.
    """

    def __init__(self, predict: PredictSamples, eval_dataset: Any, *, num_samples: int, device: torch.device) -> None:
        several = isinstance(eval_dataset, Mapping)
        sets = {f"_{name}": part for name, part in eval_dataset.items()} if several else {"": eval_dataset}
        self._predict, self._sets, self._num_samples = predict, sets, num_samples
        self._device = device
        self._samples: dict[str, list[Any]] = {}
        self._has_warned = False

    def make(self, model: torch.nn.Module, *, epoch: float) -> dict[str, Any]:
        """
        The tables and charts by name, as wandb's `run.log` takes them; `model` is the unwrapped one.

        Leaves the random generators and the model's modes as they were. What the task's predict_samples raises is a
        warning, once, and its table is missing.
        """
        values: dict[str, Any] = {}
        with undisturbed(model, self._device), torch.no_grad():
            for suffix, dataset in self._sets.items():
                model.eval()
                try:
                    if suffix not in self._samples:
                        self._samples[suffix] = _first(dataset, self._num_samples)
                    predictions = self._predict(model, self._samples[suffix])
                    values |= {f"{name}{suffix}": value for name, value in _media(predictions, epoch).items()}
                except Exception as error:  # the user's code: anything; no training ends for the sake of a table
                    self._warn(error)
        return values

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            logger.warning("The task's predict_samples failed, a table is missing, the training goes on: %s", reason)
            logger.debug("It was raised here:", exc_info=error)
        self._has_warned = True


def _first(dataset: Any, count: int) -> list[Any]:
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return list(islice(iter(dataset), count))
    return [dataset[i] for i in range(min(count, len(dataset)))]


@contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Put back all generators, the modes of the modules, and how the model generates."""
    generators = rng.capture(device, world_size=2)  # of all devices: the model may be spread over them
    owned = [(module, name) for module in model.modules() for name in MODES if name in vars(module)]
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    owned += [(config, "use_cache") for config in configs if hasattr(config, "use_cache")]
    values = [(owner, name, getattr(owner, name)) for owner, name in owned]
    generation: Any = getattr(model, "generation_config", None)
    kept = copy.deepcopy(generation)
    try:
        yield
    finally:
        for owner, name, value in values:
            setattr(owner, name, value)
        if kept is not None:
            vars(generation).update(vars(kept))
            model.generation_config = generation
        rng.restore(generators, device)


def _media(predictions: SamplePredictions, epoch: float) -> dict[str, Any]:
    """The table, the epoch its last column as in the W&B guide, and the charts of a classification."""
    import wandb

    rows = [[*row, epoch] for row in predictions.rows]
    media = {TABLE: wandb.Table(columns=[*predictions.columns, "epoch"], data=rows)}
    if predictions.class_names is None or predictions.labels is None or predictions.probabilities is None:
        return media
    probabilities = np.asarray(predictions.probabilities, dtype=np.float64)
    if len(rows) == 0 or not np.isfinite(probabilities).all():  # a training that diverged predicts nothing
        return media
    return media | _charts(list(predictions.class_names), np.asarray(predictions.labels), probabilities)


def _charts(names: list[str], labels: Any, probabilities: Any) -> dict[str, Any]:
    """
    Confusion matrix and precision-recall curves; `labels` (samples,), `probabilities` (samples, classes).

    A matrix larger than wandb's tables has the classes that occur alone; if it is still too large it is left out.
    """
    import wandb

    predicted, present = probabilities.argmax(axis=1), np.unique(labels)
    # wandb takes column i for the i-th class that is present.
    curves = wandb.plot.pr_curve(labels, probabilities[:, present], names)
    charts = {} if curves is None else {CURVES: curves}
    shown = np.arange(len(names))
    if len(shown) ** 2 > wandb.Table.MAX_ROWS:
        shown = np.union1d(labels, predicted)
    if len(shown) ** 2 <= wandb.Table.MAX_ROWS:
        true, given = (np.searchsorted(shown, ids).tolist() for ids in (labels, predicted))
        charts[MATRIX] = wandb.plot.confusion_matrix(
            y_true=true, preds=given, class_names=[names[index] for index in shown]
        )
    return charts
