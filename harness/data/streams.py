"""Batches of a stream, and the stream's state after each, so that a resume goes on there without reading again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from harness.data.packing import PackedStream
from harness.data.samples import class_if_loaded
from harness.errors import ConfigError

# A worker's state after one of its batches: its number, its count of batches, and its stream's state or None.
Mark = Mapping[str, Any]
Make = Callable[..., Mapping[str, Any] | None]


class StreamBatches(IterableDataset[Any]):
    """
    The batches of one rank, each with the mark of its worker after it; (None, None) stands for no batch.

    All ranks read the whole stream in rounds of a batch for each, as accelerate's IterableDatasetShard does. In the
    last round a batch may be short, and a rank without samples gets the first ones, which its mark says; with `fills`
    the whole round is filled up with them. Workers divide the stream among themselves and give batches in turn.
    """

    def __init__(
        self,
        stream: Any,
        make: Make,
        *,
        batch_size: int,
        drop_last: bool,
        ranks: tuple[int, int],
        num_workers: int,
        fills: bool = False,
    ) -> None:
        self.stream, self.make = stream, make
        self.source = stream.stream if isinstance(stream, PackedStream) else stream
        self.batch_size, self.drop_last, self.fills = batch_size, drop_last, fills
        self.process_index, self.num_processes = ranks
        self.num_workers = max(1, num_workers)
        self.fault = why_no_state(self.source)
        # In shared memory, so that persistent workers see the next epoch.
        self.epoch: torch.Tensor = torch.tensor(0).share_memory_()  # type: ignore[no-untyped-call]
        self._start: Mapping[str, Any] | None = None
        self._marks: list[Mark | None] = [None] * self.num_workers
        self._next_worker = 0
        self._beginning: Any = None

    def begin(self, epoch: int, state: Mapping[str, Any] | None) -> None:
        """Start an epoch, from what `state_dict` returned in it, or from its beginning."""
        self.epoch.fill_(epoch)
        self._start = state
        self._marks = [None] * self.num_workers if state is None else list(state["workers"])
        self._next_worker = 0 if state is None else state["next_worker"]
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def consumed(self, mark: Mark | None) -> None:
        """Count a batch that is trained on now; batches that are only drawn ahead are not counted."""
        if mark is not None:
            self._marks[mark["worker"]] = mark
            self._next_worker = (mark["worker"] + 1) % self.num_workers

    def state_dict(self) -> dict[str, Any] | None:
        """
        Return each worker's position after the consumed batches, as plain values.

        None if the stream offers no state.
        """
        if self.fault or any(mark is not None and mark["state"] is None for mark in self._marks):
            return None
        return {"workers": list(self._marks), "next_worker": self._next_worker}

    def __iter__(self) -> Iterator[tuple[Mapping[str, Any] | None, Mark | None]]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        start, self._start = self._start, None
        mark: Mark = {"batches": 0, "state": None}
        if start is not None:
            mark = start["workers"][worker] or mark
            if worker < start["next_worker"]:
                yield None, None  # keeps the workers' turns: the loader starts with the first worker
        self._load(mark["state"])
        rounds = self._rounds(is_whole=mark["state"] is None)
        state, is_repeated = None, False

        def fetch() -> list[Any]:
            nonlocal state, is_repeated
            samples, state, is_repeated = next(rounds, ([], None, False))
            return samples

        epoch = int(self.epoch)
        for i in itertools.count(mark["batches"]):
            batch = self.make(fetch, epoch, self.process_index, worker, i)
            if batch is None:
                return
            yield batch, {"worker": worker, "batches": i + 1, "state": state, "is_repeated": is_repeated}

    def _load(self, state: Any) -> None:
        """Set the stream to a state; None is its beginning."""
        if state is not None and self._beginning is None:
            # A stream of `datasets` builds its state when it is read: an empty state is the beginning.
            built_when_read = isinstance(self.stream, class_if_loaded("datasets", "IterableDataset"))
            self._beginning = {} if built_when_read else self.stream.state_dict()
        if self._beginning is not None:
            self.stream.load_state_dict(self._beginning if state is None else state)
        # As accelerate with several processes.
        generator = getattr(self.source, "generator", None)
        if self.num_processes > 1 and isinstance(generator, torch.Generator) and not hasattr(self.source, "set_epoch"):
            generator.manual_seed(int(self.epoch))

    def _rounds(self, *, is_whole: bool) -> Iterator[tuple[list[Any], Any, bool]]:
        """Yield this rank's samples of each round, the stream's state after it, and whether they are repeated ones."""
        size = self.batch_size * self.num_processes
        own = slice(self.process_index * self.batch_size, (self.process_index + 1) * self.batch_size)
        samples = iter(self.stream)
        first: list[Any] = []
        try:
            read = list(islice(samples, size))
        except (LookupError, TypeError, ValueError) as error:
            if is_whole:
                raise
            raise ConfigError(
                f"The stream can't go on from its saved state ({type(error).__name__}: {error}): it is built or read "
                "otherwise than before; put that back, or give --ignore_data_skip to begin the epoch's data anew."
            ) from error
        while len(read) == size:
            first = first or (read if is_whole else [])
            yield read[own], self._state(), False
            read = list(islice(samples, size))
        if not read or self.drop_last:
            return
        state, is_repeated = self._state(), own.start >= len(read)
        if is_repeated or (self.fills and self.num_processes > 1):
            if not is_whole:  # resumed behind them
                self._load(None)
                first = list(islice(iter(self.stream), size))
            read += list(islice(itertools.cycle(first or tuple(read)), size - len(read)))
        yield read[own], state, is_repeated and not self.fills

    def _state(self) -> Any:
        try:
            return None if self.fault else _plain(self.stream.state_dict())
        except TypeError:  # loading it would need unsafe pickles: read the stream again instead
            return None


def why_no_state(stream: Any) -> str:
    """Return why a stream can't resume from a state; empty if it can."""
    if not (hasattr(stream, "state_dict") and hasattr(stream, "load_state_dict")):
        return "it has no state_dict and load_state_dict"
    shuffled = class_if_loaded("datasets.iterable_dataset", "BufferShuffledExamplesIterable")
    sources: list[Any] = [getattr(stream, "_ex_iterable", None)]
    while sources:
        source = sources.pop()
        if isinstance(source, shuffled):
            return "a shuffle buffer is not in its state"
        sources += [source.ex_iterable] if hasattr(source, "ex_iterable") else getattr(source, "ex_iterables", [])
    return ""


def _plain(value: Any) -> Any:
    """Return a copy in types that are loaded with weights_only=True. Raises TypeError for any other."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value] if isinstance(value, list) else tuple(_plain(each) for each in value)
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise TypeError(f"{type(value).__name__} is no plain value")
