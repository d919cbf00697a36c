"""What a micro-batch weighs in the loss of a step, learned from the model by a few small forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, TypeGuard

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from harness.training import rng

Batch = Mapping[str, Any]
LossOf = Callable[[Batch, int], float]
TOKENS, SHIFTED_TOKENS, SAMPLES, BATCHES = "tokens", "shifted tokens", "samples", "micro-batches"
# Samples of a forward pass, and steps in which unequal ones are looked for.
FEW, TRIES = 4, 10
# How many times the number of items makes what is divided by it vanish beside the rest of a loss, and the share of a
# loss below which a part of it is none.
FAR, NOTHING = 2**40, 1e-5
# How far a loss may be from what a weight makes of its parts'. In half precision, and with kernels that differ by the
# size of the batch, a small model's first losses are all alike within that: then the likeliest weight is taken.
EXACT, ROUGH = (1e-6, 1e-5), (5e-3,)
# Shares of a sample's targets that are left out, until what may weigh divides its batch in other proportions.
HIDDEN = (1 / 2, 1 / 4, 3 / 4)


class Repeated(dict[str, Any]):
    """A batch that weighs nothing: its samples are in others already, it is there since each rank needs one."""


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """
    How the loss of a micro-batch becomes a part of the loss of the whole batch.

    A model's loss is a + b / num_items_in_batch. `sums` says that there is a b: those of all micro-batches are added
    up. `means` says that there is an a, a mean over the micro-batch alone: they are averaged, and each weighs what the
    micro-batch holds of `by`.
    """

    sums: bool
    means: bool
    by: str

    @property
    def both(self) -> bool:
        """Whether a loss has both parts."""
        return self.sums and self.means


def rows(batch: Batch) -> int:
    """Return the number of samples in a batch: the length of its labels, or of what else comes first."""
    tensors = (batch.get("labels"), *batch.values())
    return next((len(each) for each in tensors if isinstance(each, torch.Tensor) and each.ndim > 0), 1)


def num_documents(packed: Batch) -> torch.Tensor:
    """Return the number of documents in packed rows: position 1 stands once in each, and in no padding. No sync."""
    count: torch.Tensor = packed["position_ids"].eq(1).sum()
    return count


def num_tokens(packed: Batch) -> torch.Tensor:
    """Return the number of tokens in packed rows, without padding, which is all at position 0. No host sync."""
    others: torch.Tensor = packed["position_ids"].gt(0).sum()
    return others + num_documents(packed)


def take(batch: Batch, index: Sequence[int]) -> dict[str, Any]:
    """Return some samples of a batch: rows of everything in it that is as long as its labels."""
    count = rows(batch)

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[list(index)] if value.ndim > 0 and len(value) == count else value
        if isinstance(value, Mapping):
            return {name: of(each) for name, each in value.items()}
        return [value[i] for i in index] if isinstance(value, (list, tuple)) and len(value) == count else value

    return {name: of(value) for name, value in batch.items()}


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the losses of a model are of: the labels under a name, which the loss itself shifts by one or not."""

    name: str
    shifts: bool

    def of(self, batch: Batch, *, shifted: bool) -> torch.Tensor:
        """Return the labels that count unless they are -100; `shifted` leaves out the first, which is never one."""
        if "shift_labels" in batch:
            labels: torch.Tensor = batch["shift_labels"]
            return labels
        labels = batch[self.name]
        return labels[..., 1:] if shifted else labels

    def count(self, batch: Batch) -> torch.Tensor | int:
        """Return the number of labels that count, num_items_in_batch of a single batch. No host sync."""
        return 0 if isinstance(batch, Repeated) else self.of(batch, shifted=self.shifts).ne(-100).sum()

    def weight(self, batch: Batch, by: str) -> torch.Tensor | int:
        """Return how much of `by` a batch holds; 0 if all its samples are in another one already. No host sync."""
        if isinstance(batch, Repeated):
            return 0
        if by in (TOKENS, SHIFTED_TOKENS):
            return self.of(batch, shifted=by == SHIFTED_TOKENS).ne(-100).sum()
        return rows(batch) if by == SAMPLES else 1

    def candidates(self, batch: Batch) -> tuple[str, ...]:
        """Return what may weigh, the likeliest first."""
        labels = batch.get(self.name)
        if are_tokens(labels):
            return (SHIFTED_TOKENS, TOKENS, SAMPLES) if self.shifts else (TOKENS, SHIFTED_TOKENS, SAMPLES)
        is_class = isinstance(labels, torch.Tensor) and not labels.is_floating_point()
        return (SAMPLES, TOKENS) if is_class else (SAMPLES,)

    def choose(self, window: Sequence[Batch]) -> dict[str, Any] | None:
        """
        Return a few samples of a step to learn from, those with most and with fewest targets; None if none has any.

        The samples are of the first micro-batch in which they are unequal, if there is one.
        """
        found: dict[str, Any] | None = None
        for batch in window:
            order = self._sorted(batch)
            few = [i for i, _ in (order if len(order) <= FEW else order[: FEW // 2] + order[-(FEW // 2) :])]
            if few and found is None:
                found = take(batch, few)
            if few and order[0][1] != order[-1][1]:
                return take(batch, few)
        return found

    def _sorted(self, batch: Batch) -> list[tuple[int, int]]:
        """Return (sample, its number of targets) of those that have some, the most first."""
        if not are_tokens(batch.get(self.name)):
            return [(i, 1) for i in range(rows(batch))]
        counts = self.of(batch, shifted=self.shifts).ne(-100).flatten(1).sum(1).tolist()
        return sorted(((i, count) for i, count in enumerate(counts) if count > 0), key=lambda each: -each[1])

    def unequal(self, batch: Batch, *, ignores: bool, hidden: float) -> dict[str, Any]:
        """
        Return at least two samples, of which the first has fewer targets, if -100 may be put in or is there.

        `hidden` is the share that it loses.
        """
        marked = take(batch, range(rows(batch)) if rows(batch) > 1 else (0, 0))
        for name in (self.name, "shift_labels"):
            if are_tokens(labels := marked.get(name)) and (ignores or bool((labels == -100).any())):
                labels = labels.clone()
                counted = labels[0].ne(-100)
                number = counted.flatten().cumsum(0).view_as(counted)
                labels[0] = torch.where(number <= (counted.sum() * hidden).long(), -100, labels[0])
                marked[name] = labels
        return marked


def are_tokens(labels: Any) -> TypeGuard[torch.Tensor]:
    """Whether labels are ids, several a sample."""
    return isinstance(labels, torch.Tensor) and labels.ndim >= 2 and not labels.is_floating_point()


@dataclass(frozen=True, kw_only=True)
class Probe:
    """
    What is needed to learn from a model's loss.

    `loss_of` returns the loss of a batch, a scalar, for a number of items; with a sharded model it is collective.
    `ignores` says that labels of -100 may be put in, `is_exact` that a sample's loss is the same in any batch but for
    float32's rounding.
    """

    loss_of: LossOf
    targets: Targets
    ignores: bool
    is_exact: bool

    def parts(self, few: Batch) -> Weighing:
        """Learn from two forward passes which parts the loss has; `by` is a guess."""
        likeliest = self.targets.candidates(few)[0]
        items = int(self.targets.weight(few, likeliest))
        near, far = self.loss_of(few, items), self.loss_of(few, items * FAR)
        if near == 0 or not math.isfinite(near):
            return Weighing(sums=True, means=True, by=likeliest)  # which fits every loss
        sums = abs(near - far) > NOTHING * abs(near)
        means = abs(far - near / FAR) > NOTHING * abs(near)
        return Weighing(sums=sums, means=means, by=likeliest)

    def weight(self, few: Batch) -> tuple[str | None, str]:
        """
        Learn from three forward passes by what means are weighted: the whole must be the weighted mean of two parts.

        Returns None where these samples can't tell, and why it is none of the candidates; empty if it is one.
        """
        names = self.targets.candidates(few)
        for hidden in HIDDEN:
            marked = self.targets.unequal(few, ignores=self.ignores, hidden=hidden)
            parts = (take(marked, [0]), take(marked, range(1, rows(marked))))
            weights = {by: tuple(int(self.targets.weight(part, by)) for part in parts) for by in names}
            if not are_tokens(few.get(self.targets.name)) or not _are_alike(weights):
                break
        else:
            return None, ""
        far = int(self.targets.weight(few, names[0])) * FAR
        try:
            whole, first, rest = (self.loss_of(each, far) for each in (marked, *parts))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any: a loss of one's own may refuse a single sample
            return BATCHES, f"a part of a batch fails ({type(error).__name__}: {error})"
        for tolerance, (by, (one, others)) in product(EXACT if self.is_exact else ROUGH, weights.items()):
            expected = (first * one + rest * others) / max(one + others, 1)
            if math.isnan(whole) or abs(expected - whole) <= tolerance * abs(whole):
                return by, ""
        return BATCHES, f"the loss of a batch is no mean of its parts' by {' nor by '.join(names)}"


def _are_alike(weights: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether two weights divide a whole alike; tokens and shifted tokens may be the same."""
    return any(
        one[0] * other[1] == one[1] * other[0] and (one != other or SAMPLES in (name, by))
        for (name, one), (by, other) in combinations(weights.items(), 2)
    )


@contextmanager
def untouched(model: torch.nn.Module, device: torch.device) -> Iterator[Callable[[], None]]:
    """
    Put the model into evaluation mode for the block, then all back: modes, buffers, random generators.

    Yields a function that puts the generators back in between, so that a model that draws draws the same. Batch norms
    stay in training mode: what they compute of a batch is a part of its loss.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    generators = {**rng.capture(device), "own": rng.capture_own(device)}
    model.eval()
    for module in modes:
        if isinstance(module, _BatchNorm):
            module.train(modes[module])
    try:
        with torch.no_grad():
            yield lambda: rng.restore(generators, device)
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, content in buffers:
                buffer.copy_(content)
        rng.restore(generators, device)
