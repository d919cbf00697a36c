"""Batches by tokens: a data set is divided once, so that each batch with its padding stays within a number of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from harness.data.lengths import Order, measure, random_order
from harness.errors import ConfigError
from harness.training import rng

FIRST_LOOK = 64


@dataclass(frozen=True, kw_only=True)
class TokenBatches:
    """
    The batches of a data set: batch i holds the samples `order[starts[i] : starts[i + 1]]`.

    An evaluation divides each among its ranks, in shares of equal size.
    """

    max_tokens: int
    order: Order
    starts: Order

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> list[int]:
        return self.order[self.starts[number] : self.starts[number + 1]].tolist()  # type: ignore[no-any-return]

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that tell these batches from others."""
        content = hashlib.sha256()
        for part in (self.order, self.starts):
            content.update(np.ascontiguousarray(part).data)
        return content.hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """Return what a position in these batches is counted in: plain values."""
        return {
            "max_tokens_per_batch": self.max_tokens,
            "token_batches": len(self),
            "token_batches_digest": self.digest,
        }


@dataclass(frozen=True, kw_only=True)
class TokenLimit:
    """
    How to divide a data set: tokens of a rank's batch, and the keys that are padded, each by itself.

    With `in_order` the samples stay in the data's order; else those of similar length come together, ties in an order
    drawn from the seed. `num_ranks` share a batch, which is as many times larger.
    """

    max_tokens: int
    names: tuple[str, ...]
    seed: int
    in_order: bool = False
    num_ranks: int = 1

    def divide(self, dataset: Any, *, column: str) -> TokenBatches:
        """
        Measure the samples, and divide them. Reads all of them, unless they are a table's.

        Raises ConfigError for samples without a length, or longer than a batch may be.
        """
        flag = f"--max_tokens_per_batch={self.max_tokens}"
        try:
            with rng.seeded(self.seed):  # samples that draw random numbers have the same lengths at each start
                lengths = measure(dataset, self.names, column=column)
        except ValueError as error:
            raise ConfigError(
                f"{flag}: {error}, so their tokens can't be counted; name a column with --length_column_name, or use "
                "--per_device_train_batch_size."
            ) from error
        if len(lengths) > 0 and (longest := int(lengths.sum(1).max())) > self.max_tokens:
            place = int(lengths.sum(1).argmax())
            raise ConfigError(
                f"{flag}: sample {place} has {longest} tokens; give at least as many, or a smaller maximal length of "
                "samples."
            )
        order = self._order(lengths)
        return TokenBatches(max_tokens=self.max_tokens, order=order, starts=self._starts(lengths, order))

    def _order(self, lengths: npt.NDArray[np.int32]) -> Order:
        if self.in_order:
            return np.arange(len(lengths), dtype=np.int32)
        order = random_order(len(lengths), torch.Generator().manual_seed(self.seed))
        if lengths.shape[1] == 1:
            return order[np.argsort(-lengths[order, 0], kind="stable")]
        return order[np.lexsort(tuple(-lengths[order, i] for i in reversed(range(lengths.shape[1]))))]

    def _starts(self, lengths: npt.NDArray[np.int32], order: Order) -> Order:
        """Return where each batch begins, and where the last one ends: each takes as many samples as fit."""
        starts = [0]
        while starts[-1] < len(order):
            starts.append(starts[-1] + self._fitting(lengths, order, starts[-1]))
        return np.asarray(starts, dtype=np.int64)

    def _fitting(self, lengths: npt.NDArray[np.int32], order: Order, start: int) -> int:
        """Return how many samples from `start` on a batch takes: a multiple of the ranks, unless the data ends."""
        ranks, look = self.num_ranks, FIRST_LOOK * self.num_ranks
        while True:
            block = lengths[order[start : start + look]]
            shares = -(-np.arange(1, len(block) + 1) // ranks)
            padded = np.maximum.accumulate(block, axis=0).sum(1, dtype=np.int64)
            fitting = int(np.searchsorted(padded * shares, self.max_tokens, side="right"))
            if fitting < len(block) or start + look >= len(order):
                break
            look *= 4
        if start + fitting == len(order):
            return fitting
        # A sample for each rank always fits: they are not padded to one another.
        return max(fitting // ranks * ranks, min(ranks, len(order) - start))
