"""Lengths of samples, and an order in which those of similar length stand together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Order = npt.NDArray[np.integer[Any]]
# Of samples, in rows of an Arrow table that are read at once.
AT_ONCE = 10_000
# Groups of samples that are sorted together, at most.
GROUPS = 50


def random_order(size: int, generator: torch.Generator | None) -> Order:
    """
    Return the permutation that `torch.randperm` draws, in 32 bits where they hold it.

    It is the same in any type of integer, and of 100 million samples it takes 400 MB instead of 800.
    """
    dtype = torch.int32 if size <= np.iinfo(np.int32).max else torch.int64
    return torch.randperm(size, generator=generator, dtype=dtype).numpy()


def measure(dataset: Any, names: Sequence[str], *, column: str) -> npt.NDArray[np.int32]:
    """
    Return the lengths of what the samples hold under `names`, (samples, names), or those of a table's `column`.

    A name but the first may be missing in the first sample; then it is left out. A table of `datasets` is not read
    sample by sample, unless a transform makes them.

    Raises ValueError if samples have no such key, or it has no length.
    """
    table = dataset if hasattr(dataset, "select_columns") else None
    if table is not None and column in table.column_names:
        return np.asarray(table[column][:], dtype=np.int32).reshape(-1, 1)
    first = dataset[0] if len(dataset) > 0 else {}
    if not isinstance(first, Mapping) or names[0] not in first:
        raise ValueError(f"samples have no {names[0]}")
    names = [name for name in names if name in first]
    if table is not None and table.format["type"] != "custom":
        found = [_of_lists(table, name) for name in names]
        if all(lengths is not None for lengths in found):
            return np.stack([lengths for lengths in found if lengths is not None], axis=1)
    try:
        read = np.fromiter(_read(dataset, names), dtype=np.int32)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a sample has no {' and '.join(names)} with a length") from error
    return read.reshape(-1, len(names))


def _read(dataset: Any, names: Sequence[str]) -> Iterator[int]:
    for i in range(len(dataset)):
        sample = dataset[i]
        for name in names:
            yield len(sample[name])


def _of_lists(table: Any, name: str) -> npt.NDArray[np.int32] | None:
    """Return the lengths of a column of lists; None if it holds something else, or nothing in some row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = []
    for chunk in table.select_columns([name]).with_format("arrow").iter(batch_size=AT_ONCE):
        values = chunk[name]
        kind = values.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            return None
        if values.null_count:
            return None
        parts.append(pc.list_value_length(values).to_numpy().astype(np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class LengthGroups:
    """Settings of group_by_length: samples a group, the key to measure, and a seed (None: the global generator)."""

    size: int
    input_name: str
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """
    Samples in groups of similar length, in an order that is drawn anew each time; with a seed it is always the same.

    `lengths` are (samples,).
    """

    lengths: npt.NDArray[np.int32]
    size: int
    seed: int | None

    def order(self) -> Order:
        """
        Return an order, the same as transformers' `get_length_grouped_indices` gives for these lengths and generator.

        Samples are permuted and sorted by length within `GROUPS` groups at a time; the longest of all comes first, so
        that what does not fit into memory is known at once.
        """
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        order = random_order(len(self.lengths), generator)
        if len(order) == 0:
            return order
        several = self.size * (min(len(order) // (self.size * 4), GROUPS) or 1)
        for begin in range(0, len(order), several):
            part = order[begin : begin + several]
            order[begin : begin + several] = part[np.argsort(-self.lengths[part], kind="stable")]
        longest = int(np.argmax(self.lengths[order[::several]])) * several
        order[[0, longest]] = order[[longest, 0]]
        return order
