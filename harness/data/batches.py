"""Make batches of samples: fetch, collate, and keep the random state that each was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.data import get_worker_info

from harness.data.samples import Collator
from harness.training import rng


class BatchMaker:
    """
    Fetches samples and collates them, and keeps the generators' state from before the last batch.

    The loader is one batch ahead of the step that is saved, so a collator or a data set that draws random numbers has
    already advanced the generators for that batch. After a resume the batch is made again from its own earlier state,
    and the generators go on from the saved one. Workers have their own generators: for them nothing is kept. With a
    `seed` each batch is made from (seed, its number) instead, wherever it is made, and the generators are left as they
    were.
    """

    def __init__(self, collate: Collator, *, seed: int | None, device: torch.device) -> None:
        self.collate, self.seed, self.device = collate, seed, device
        self.before: rng.RngState | None = None
        self._replay: tuple[rng.RngState, rng.RngState] | None = None
        self._skip = 0

    def replay(self, before: rng.RngState, after: rng.RngState, *, skip: int) -> None:
        """Let `skip` batches pass, make the next one from the state `before`, then go on from the state `after`."""
        self._replay, self._skip = (before, after), skip

    def cancel_replay(self) -> None:
        """Cancel a replay whose batch was not made yet."""
        self._replay, self._skip = None, 0

    def __call__(self, fetch: Callable[[], list[Any]], *number: int) -> Mapping[str, Any] | None:
        """Make the batch of one number, or of several calls that share it; returns None if there are no samples."""
        if get_worker_info() is not None:
            return self._make(fetch, number)
        if self._skip > 0:
            self._skip -= 1
            return self._make(fetch, number)
        if self._replay is None:
            self.before = rng.capture_host()
            return self._make(fetch, number)
        (self.before, after), self._replay = self._replay, None
        rng.restore_host(self.before)
        batch = self._make(fetch, number)
        rng.restore(after, self.device)
        return batch

    def _make(self, fetch: Callable[[], list[Any]], number: tuple[int, ...]) -> Mapping[str, Any] | None:
        with nullcontext() if self.seed is None else rng.seeded(self.seed, *number):
            samples = fetch()
            return self.collate(samples) if samples else None


class IndexedBatches:
    """A data set whose items are batches, by index: (epoch, number in the epoch, indices of the samples) -> batch."""

    def __init__(self, dataset: Any, make: BatchMaker) -> None:
        self.dataset, self.make = dataset, make

    def __getitem__(self, place: tuple[int, int, list[int]]) -> tuple[Mapping[str, Any] | None, None]:
        epoch, number, indices = place
        return self.make(partial(_fetched, self.dataset, indices), epoch, number), None


def _fetched(dataset: Any, indices: list[int]) -> list[Any]:
    # As torch's loader: all samples at once where the data set supports it.
    if getattr(dataset, "__getitems__", None):
        return list(dataset.__getitems__(indices))
    return [dataset[i] for i in indices]


def as_it_is(batch: Any) -> Any:
    """Return the batch: the collator for batches that are made already."""
    return batch
