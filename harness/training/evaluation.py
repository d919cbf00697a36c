"""Evaluation and prediction: the Trainer's values, without keeping logits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.trainer_utils import speed_metrics

from harness.distributed.sharding import reshard
from harness.distributed.transfer import to_device
from harness.errors import ConfigError
from harness.tasks import Generate, Metrics
from harness.training.loss import Loss
from harness.training.weighing import FAR, Batch, Repeated, are_tokens, rows, take

# What transformers' outputs call the keys and values of a decoder; the Trainer ignores them by default.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """
    A prepared loader over one evaluation set and the prefix of its metrics: eval, eval_<name> or test.

    `order` is that of the samples in the loader, None if it is the data's. `num_batches` is given where they are not of
    `batch_size` samples a rank.
    """

    prefix: str
    loader: Any
    batch_size: int
    order: npt.NDArray[np.integer[Any]] | None = None
    num_batches: int | None = None

    @property
    def num_samples(self) -> int | None:
        """The number of samples in the set; None for a stream."""
        dataset = self.loader.dataset
        return len(dataset) if hasattr(dataset, "__len__") else None

    @property
    def num_documents(self) -> int | None:
        """The number of documents in packed rows; None where samples are no rows, and for a stream."""
        found: int | None = getattr(self.loader.dataset, "num_documents", None)
        return found


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """
    The result: `metrics` in the Trainer's names and order; `extras` of ours, with a slash, for the trackers only.

    `predictions` holds what Metrics.predictions returned for the logits, if they were to be kept.
    """

    metrics: dict[str, float]
    extras: dict[str, float] = field(default_factory=dict)
    predictions: npt.NDArray[Any] | None = None


# What is measured of a batch. A loss that is in part a mean and in part a sum over num_items is measured in two parts.
COLUMNS = ("loss", "weight", "samples", "token_loss", "tokens", "summed", "items")
Row = dict[str, torch.Tensor | int]
ROWS_OF_A_BLOCK = 256


class Measured:
    """The COLUMNS of the batches of all ranks, on the host, in the order of their samples: an array each."""

    def __init__(self, rows: npt.NDArray[np.float32]) -> None:
        self.of = dict(zip(COLUMNS, rows.T, strict=True))

    def loss(self, *, drops_non_finite: bool) -> float:
        """Return the loss of all samples; without the losses that are not finite, if there are others."""
        found = _mean(*(self.of[name] for name in ("loss", "weight", "samples")), drops_non_finite=drops_non_finite)
        if not self.of["items"].any():
            return found
        items = self.of["items"]
        return found + _mean(self.of["summed"], items, self.of["samples"], drops_non_finite=drops_non_finite)

    @property
    def num_samples(self) -> int:
        """The number of samples, each counted once."""
        return int(self.of["samples"].astype(np.float64).sum())

    def per_token(self) -> tuple[float, float]:
        """Return the loss per token and the number of tokens."""
        tokens, loss = (self.of[name].astype(np.float64) for name in ("tokens", "token_loss"))
        # A rank without a token that counts has a NaN mean.
        return float(np.where(tokens > 0, loss * tokens, 0.0).sum() / max(tokens.sum(), 1)), float(tokens.sum())


def _mean(
    loss: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    samples: npt.NDArray[np.float32],
    *,
    drops_non_finite: bool,
) -> float:
    kept = weight > 0
    if drops_non_finite and (kept & np.isfinite(loss)).any():
        kept &= np.isfinite(loss)
    loss, weight, samples = loss[kept], weight[kept], samples[kept]
    if len(loss) == 0:
        return math.nan
    if (weight * samples[0] == weight[0] * samples).all():  # the Trainer's mean over the samples, to the bit
        return float(np.repeat(loss, samples.astype(np.int64)).mean())
    return float(np.average(loss.astype(np.float64), weights=weight.astype(np.float64)))


class EvalLosses:
    """The losses of the batches of one rank in an evaluation: kept on the device, gathered once, at its end."""

    def __init__(self, loss: Loss, accelerator: Accelerator, *, batch_size: int) -> None:
        self.loss, self.accelerator, self.batch_size = loss, accelerator, batch_size
        self._rows: list[torch.Tensor] = []
        self._blocks: list[torch.Tensor] = []

    def measure(self, model: torch.nn.Module, batch: Batch, *, has_tokens: bool) -> Any:
        """
        Collective: compute the loss of a batch, and return the model's outputs.

        In a last round that is filled up it is computed again without the samples that are repeated. All ranks take
        part in that, since the model may be sharded.
        """
        size, state = rows(batch), self.accelerator.gradient_state
        left = state.remainder if state.end_of_dataloader else 0
        samples, real = self._share(left, size), batch
        loss, outputs, items = self._compute(model, batch)
        of_real = loss
        if 0 < left < size * self.accelerator.num_processes:
            real = take(batch, range(samples)) if samples > 0 else Repeated(batch)
            of_real, _, items = self._compute(model, real)
            of_real = of_real * (samples > 0)
        measured: Row = {"loss": loss, "samples": samples, "token_loss": of_real, "tokens": items if has_tokens else 0}
        if self.loss.as_trainer:
            measured["samples"] = measured["weight"] = self._share(left, self.batch_size)
        else:
            measured |= self._weighed(model, real, of_real, items)
        self._rows.append(_row(measured, self.accelerator.device))
        if len(self._rows) == ROWS_OF_A_BLOCK:  # a tensor of its own takes many times its numbers
            self._blocks.append(torch.stack(self._rows))
            self._rows = []
        return outputs

    def _share(self, left: int, size: int) -> int:
        """Return how many of a batch's samples are real; in the last round `left` are, of all ranks."""
        return min(max(left - self.accelerator.process_index * size, 0), size) if left > 0 else size

    def _compute(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, Any, torch.Tensor | int]:
        """Return a batch's loss, the outputs, and the number of items that it is divided by; 0 if it is by none."""
        if self.loss.as_trainer:
            share = self.loss.shares(model, [batch])[0]
            loss, outputs = self.loss(model, batch, share)
            return loss.mean(), outputs, 0 if share.num_items is None else share.num_items
        takes = self.loss.takes_num_items(batch)
        items = self.loss.targets.count(batch) if takes else 0
        loss, outputs = self.loss.compute(model, batch, self._at_least_one(items) if takes else None)
        return loss.mean(), outputs, items

    def _weighed(self, model: torch.nn.Module, batch: Batch, loss: torch.Tensor, items: torch.Tensor | int) -> Row:
        weighing = self.loss.eval_weighing(model, batch)
        if not weighing.means:
            return {"loss": loss, "weight": items}
        weight = self.loss.targets.weight(batch, weighing.by)
        if not weighing.sums:
            return {"loss": loss, "weight": weight}
        mean = self.loss.compute(model, batch, self._at_least_one(items) * FAR)[0].mean()
        return {"loss": mean, "weight": weight, "summed": loss - mean, "items": items}

    def _at_least_one(self, items: torch.Tensor | int) -> torch.Tensor:
        return torch.as_tensor(items, device=self.accelerator.device).clamp(min=1) / 1

    def gather(self) -> Measured | None:
        """Collective: return the losses of all ranks; None if none was measured. One host sync."""
        if not (self._blocks or self._rows):
            return None
        rows = torch.cat([*self._blocks, *([torch.stack(self._rows)] if self._rows else [])])
        gathered = self.accelerator.gather(rows.unsqueeze(0))
        return Measured(gathered.transpose(0, 1).flatten(0, 1).cpu().numpy())


def _row(measured: Row, device: torch.device) -> torch.Tensor:
    values = [measured.get(name, 0) for name in COLUMNS]
    on_host = [0.0 if isinstance(value, torch.Tensor) else float(value) for value in values]
    numbers = to_device(torch.tensor(on_host, dtype=torch.float32, device="cpu"), device)
    return torch.stack([numbers[i] if isinstance(value, int) else value.float() for i, value in enumerate(values)])


class Evaluator:
    """
    Runs a model over evaluation sets.

    Mirrors Trainer.evaluation_loop and Trainer.prediction_step. eval_loss is the loss of all samples at once; with
    --loss_scaling trainer it is the mean over samples of the means of their batches. In addition there is the loss per
    token, which does not depend on the batch size in either case.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        loss: Loss,
        metrics: Callable[[], Metrics] | None,
        generate: Generate | None,
        drops_non_finite: bool,
        logged_outputs: tuple[str, ...] = (),
    ) -> None:
        self.generate = generate if metrics is not None else None  # without metrics no texts are needed
        self.accelerator, self.loss, self.metrics = accelerator, loss, metrics
        self.drops_non_finite, self.logged_outputs = drops_non_finite, logged_outputs

    def metric_names(self) -> set[str]:
        """
        The names of an evaluation's metrics, without prefix, known before running one.

        Times are left out: they differ between ranks, which must decide alike.
        """
        # As in the Trainer there is none without labels, unless the model's loss needs none.
        loss = {"loss"} if self.loss.label_names or self.loss.needs_no_labels else set()
        return {*loss, *(self.metrics().names if self.metrics is not None else ())}

    @torch.no_grad()
    def run(self, model: torch.nn.Module, data: EvalSet, *, keep_predictions: bool = False) -> Evaluation:
        """Collective: evaluate `model` on one set, in eval mode; it is left in eval mode."""
        started_at = time.time()
        model.eval()
        metrics = self.metrics() if self.metrics is not None else None
        losses = EvalLosses(self.loss, self.accelerator, batch_size=data.batch_size)
        kept: list[torch.Tensor] = []
        seen, labels = 0, None
        for batch in data.loader:
            labels = self._labels(batch)
            if labels is None and data.prefix != "test":
                self.loss.check_labels(batch)
            outputs: Any = None
            if labels is not None or self.loss.needs_no_labels:
                outputs = losses.measure(model, batch, has_tokens=are_tokens(labels))
            elif self.generate is None:
                outputs = model(**batch)
            seen += data.batch_size * self.accelerator.num_processes
            if metrics is not None:
                predictions = self._update(metrics, self._predicted(model, batch, outputs), labels)
                if keep_predictions:
                    kept.append(predictions.cpu())
        reshard(model)
        measured = losses.gather()
        num_samples = data.num_samples
        if num_samples is None:  # a stream
            num_samples = seen if measured is None else measured.num_samples
        values = self._values(data.prefix, measured, metrics if labels is not None else None)
        steps = data.num_batches or math.ceil(num_samples / (data.batch_size * self.accelerator.num_processes))
        values |= speed_metrics(data.prefix, started_at, num_samples=data.num_documents or num_samples, num_steps=steps)
        return Evaluation(
            metrics=values,
            extras=self._per_token(data.prefix, measured),
            predictions=_in_order(_joined(kept), data.order) if kept else None,
        )

    def _labels(self, batch: Batch) -> Any:
        labels = tuple(batch.get(name) for name in self.loss.label_names)
        if not labels or any(label is None for label in labels):
            return None
        return labels[0] if len(labels) == 1 else labels

    def _predicted(self, model: torch.nn.Module, batch: Batch, outputs: Any) -> Any:
        """Return this rank's logits, or what the task generates in their place."""
        if self.generate is not None:
            return self.generate(self.accelerator.unwrap_model(model, keep_torch_compile=False), batch)
        bare = self.accelerator.unwrap_model(model)
        ignored = getattr(bare.config, "keys_to_ignore_at_inference", [CACHE]) if hasattr(bare, "config") else []
        return _logits(outputs, [*ignored, *self.logged_outputs])

    def _update(self, metrics: Metrics, logits: Any, labels: Any) -> torch.Tensor:
        gather, pad = self.accelerator.gather_for_metrics, self.accelerator.pad_across_processes
        predictions: torch.Tensor = gather(pad(metrics.predictions(logits, labels), dim=1, pad_index=-100))
        if labels is not None:
            metrics.update(predictions, gather(pad(labels, dim=1, pad_index=-100)))
        return predictions

    def _values(self, prefix: str, measured: Measured | None, metrics: Metrics | None) -> dict[str, float]:
        values: dict[str, float] = {}
        if measured is not None:
            values[f"{prefix}_loss"] = measured.loss(drops_non_finite=self.drops_non_finite)
            if metrics is not None:
                values |= {f"{prefix}_{name}": value for name, value in _numbers(metrics).items()}
        return values

    def _per_token(self, prefix: str, measured: Measured | None) -> dict[str, float]:
        if measured is None:
            return {}
        loss, num_tokens = measured.per_token()
        if num_tokens == 0:
            return {}
        group = prefix.replace("_", "/", 1) if "_" in prefix else prefix
        # With the Trainer's scaling each rank has counted the tokens of all.
        ranks = self.loss.num_ranks if self.loss.as_trainer else 1
        return {f"{group}/loss_per_token": loss, f"{group}/num_tokens": num_tokens / ranks}


def _numbers(metrics: Metrics) -> dict[str, float]:
    """Return the values of an evaluation. Raises ConfigError, which names it, for one that is no number."""
    values = dict(metrics.compute())
    if missing := [name for name in metrics.names if name not in values]:
        raise ConfigError(
            f"{type(metrics).__name__}.compute() returned no {', '.join(map(repr, missing))}, which its names list, "
            f"only: {', '.join(values)}."
        )
    return {name: _number(name, value, metrics) for name, value in values.items()}


def _number(name: str, value: Any, metrics: Metrics) -> float:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        value = value.item()
    if not isinstance(value, int | float):
        raise ConfigError(
            f"{type(metrics).__name__}.compute() returned {value!r} ({type(value).__name__}) as {name!r}; a metric is "
            "one number."
        )
    return float(value)


def _joined(kept: list[torch.Tensor]) -> npt.NDArray[Any]:
    if kept[0].dim() > 1:  # batches differ in length, as each is padded to its longest sample
        longest = max(part.shape[1] for part in kept)
        pad = torch.nn.functional.pad
        kept = [pad(part, (0, 0) * (part.dim() - 2) + (0, longest - part.shape[1]), value=-100) for part in kept]
    joined: npt.NDArray[Any] = torch.cat(kept).numpy()
    return joined


def _in_order(predictions: npt.NDArray[Any], order: npt.NDArray[np.integer[Any]] | None) -> npt.NDArray[Any]:
    """Return the predictions, made in an order of samples, in the data's."""
    return predictions if order is None else predictions[np.argsort(order[: len(predictions)])]


def _logits(outputs: Any, ignored: list[str]) -> Any:
    if isinstance(outputs, Mapping):
        found = [value for key, value in outputs.items() if key not in {*ignored, "loss"}]
    else:
        found = list(outputs[1:])
    # A scalar is a part of the loss, as a router's.
    logits = tuple(value for value in found if not isinstance(value, torch.Tensor) or value.ndim > 0)
    return logits[0] if len(logits) == 1 else logits
