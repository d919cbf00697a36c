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
from harness.errors import ConfigError
from harness.tasks import Generate, Metrics
from harness.training.loss import Batch, Loss

# What transformers' outputs call the keys and values of a decoder; the Trainer ignores them by default.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A prepared loader over one evaluation set and the prefix of its metrics: eval, eval_<name> or test."""

    prefix: str
    loader: Any
    batch_size: int

    @property
    def num_samples(self) -> int | None:
        """The number of samples in the set; None for a stream."""
        dataset = self.loader.dataset
        return len(dataset) if hasattr(dataset, "__len__") else None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """
    The result: `metrics` in the Trainer's names and order; `extras` of ours, with a slash, for the trackers only.

    `predictions` holds what Metrics.predictions returned for the logits, if they were to be kept.
    """

    metrics: dict[str, float]
    extras: dict[str, float] = field(default_factory=dict)
    predictions: npt.NDArray[Any] | None = None


class Evaluator:
    """
    Runs a model over evaluation sets.

    Mirrors Trainer.evaluation_loop and Trainer.prediction_step: eval_loss is the mean over samples of the means of
    their batches. In addition there is the loss per token, which does not depend on the batch size.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        loss: Loss,
        metrics: Callable[[], Metrics] | None,
        generate: Generate | None,
        drops_non_finite: bool,
    ) -> None:
        self.generate = generate if metrics is not None else None  # without metrics no texts are needed
        self.accelerator, self.loss, self.metrics = accelerator, loss, metrics
        self.drops_non_finite = drops_non_finite

    def metric_names(self) -> set[str]:
        """
        The names of an evaluation's metrics, without prefix, known before running one.

        Times are left out: they differ between ranks, which must decide alike.
        """
        loss = {"loss"} if self.loss.label_names else set()  # as in the Trainer, there is none without labels
        return {*loss, *(self.metrics().names if self.metrics is not None else ())}

    @torch.no_grad()
    def run(self, model: torch.nn.Module, data: EvalSet, *, keep_predictions: bool = False) -> Evaluation:
        """Collective: evaluate `model` on one set, in eval mode; it is left in eval mode."""
        started_at = time.time()
        model.eval()
        metrics = self.metrics() if self.metrics is not None else None
        losses: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        # Summed loss and tokens, for the loss per token.
        totals = torch.zeros(2, device=self.accelerator.device)
        seen = 0
        for batch in data.loader:
            labels = self._labels(batch)
            if labels is None and data.prefix != "test":
                self.loss.check_labels(batch)
            outputs: Any = None
            if labels is None and self.generate is None:
                outputs = model(**batch)
            elif labels is not None:
                num_items = self.loss.num_items([batch])
                loss, outputs = self.loss(model, batch, num_items)
                loss = loss.mean()
                losses.append(self.accelerator.gather_for_metrics(loss.repeat(data.batch_size)))
                if num_items is not None and _are_tokens(labels):
                    totals += self._tokens(model, batch, loss, num_items)
            seen += data.batch_size * self.accelerator.num_processes
            if metrics is not None:
                predictions = self._update(metrics, self._predicted(model, batch, outputs), labels)
                if keep_predictions:
                    kept.append(predictions.cpu())
        reshard(model)
        num_samples = data.num_samples if data.num_samples is not None else seen
        values = self._values(data.prefix, losses, metrics)
        steps = math.ceil(num_samples / (data.batch_size * self.accelerator.num_processes))
        values |= speed_metrics(data.prefix, started_at, num_samples=num_samples, num_steps=steps)
        return Evaluation(
            metrics=values,
            extras=self._per_token(data.prefix, totals),
            predictions=_joined(kept) if kept else None,
        )

    def _tokens(
        self, model: torch.nn.Module, batch: Batch, loss: torch.Tensor, num_items: torch.Tensor
    ) -> torch.Tensor:
        """Collective: return a batch's summed loss and tokens, without the samples that fill up the last round."""
        num_samples, state = len(batch["labels"]), self.accelerator.gradient_state
        left = state.remainder if state.end_of_dataloader else 0
        if 0 < left < num_samples * self.accelerator.num_processes:
            is_real = torch.arange(num_samples) + self.accelerator.process_index * num_samples < left
            is_real = is_real.to(self.accelerator.device).unsqueeze(1)
            names = [name for name in ("labels", "shift_labels") if name in batch]
            batch = {**batch, **{name: torch.where(is_real, batch[name], -100) for name in names}}
            counted = self.loss.num_items([batch])
            num_items = num_items if counted is None else counted
            loss = self.loss(model, batch, num_items)[0].mean()
        # A rank without a token that counts has a NaN mean.
        return torch.stack([torch.where(num_items > 0, loss * num_items, 0.0), num_items])

    def _labels(self, batch: Batch) -> Any:
        labels = tuple(batch.get(name) for name in self.loss.label_names)
        if not labels or any(label is None for label in labels):
            return None
        return labels[0] if len(labels) == 1 else labels

    def _predicted(self, model: torch.nn.Module, batch: Batch, outputs: Any) -> Any:
        """Return this rank's logits, or what the task generates in their place."""
        if self.generate is not None:
            return self.generate(self.accelerator.unwrap_model(model, keep_torch_compile=False), batch)
        config = getattr(self.accelerator.unwrap_model(model), "config", None)
        return _logits(outputs, getattr(config, "keys_to_ignore_at_inference", [CACHE]))

    def _update(self, metrics: Metrics, logits: Any, labels: Any) -> torch.Tensor:
        gather, pad = self.accelerator.gather_for_metrics, self.accelerator.pad_across_processes
        predictions: torch.Tensor = gather(pad(metrics.predictions(logits, labels), dim=1, pad_index=-100))
        if labels is not None:
            metrics.update(predictions, gather(pad(labels, dim=1, pad_index=-100)))
        return predictions

    def _values(self, prefix: str, losses: list[torch.Tensor], metrics: Metrics | None) -> dict[str, float]:
        values: dict[str, float] = {}
        if losses:
            every = torch.cat(losses).float().cpu().numpy()
            finite = np.isfinite(every)
            if self.drops_non_finite and finite.any():
                every = every[finite]
            values[f"{prefix}_loss"] = every.mean().item()
            if metrics is not None:
                values |= {f"{prefix}_{name}": value for name, value in _numbers(metrics).items()}
        return values

    def _per_token(self, prefix: str, totals: torch.Tensor) -> dict[str, float]:
        summed = self.accelerator.gather(totals.unsqueeze(0)).sum(0).tolist()
        if summed[1] == 0:
            return {}
        # Each rank has summed the items of all ranks, with a loss scaled to their mean, or only its own.
        group = prefix.replace("_", "/", 1) if "_" in prefix else prefix
        num_tokens = summed[1] / (self.accelerator.num_processes if self.loss.across_devices else 1)
        return {f"{group}/loss_per_token": summed[0] / summed[1], f"{group}/num_tokens": num_tokens}


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


def _are_tokens(labels: Any) -> bool:
    return isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point()


def _logits(outputs: Any, ignored: list[str]) -> Any:
    if isinstance(outputs, Mapping):
        logits = tuple(value for key, value in outputs.items() if key not in {*ignored, "loss"})
    else:
        logits = tuple(outputs[1:])
    return logits[0] if len(logits) == 1 else logits
