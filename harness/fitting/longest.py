"""The samples that take most memory: the longest of the training data, as far as that can be known quickly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from harness.data.batches import as_it_is
from harness.data.loader import TrainLoader
from harness.data.samples import class_if_loaded, worker_options

# Samples that are measured where lengths are not known without reading all, and rows of a table read at once.
MOST_READ, ROWS_AT_ONCE = 1024, 20_000


def longest_samples(loader: TrainLoader, count: int) -> list[Any]:
    """
    Return that many of the longest training samples, the longest first; from the first again if there are fewer.

    All lengths are known of a table of `datasets` whose columns are lists, and with group_by_length. Of other data as
    many as MOST_READ are measured, spread evenly. The generators move as in a reading of these samples.
    """
    dataset = loader.dataset
    lengths = _known_lengths(loader)
    if lengths is not None:
        order = np.argsort(-lengths, kind="stable")[:count].tolist()
        return _filled(_read(loader, order), count)
    size = len(dataset)
    spread = np.unique(np.linspace(0, size - 1, min(size, max(MOST_READ, count))).round().astype(np.int64))
    samples = _read(loader, spread.tolist())
    return _filled(sorted(samples, key=elements_of, reverse=True)[:count], count)


def _filled(samples: Sequence[Any], count: int) -> list[Any]:
    return [samples[i % len(samples)] for i in range(count)]


def _known_lengths(loader: TrainLoader) -> Any:
    """Return the length of each sample; None where they are not known without reading all samples."""
    if loader.lengths is not None:
        return np.asarray(loader.lengths.lengths)
    table = loader.dataset
    if not isinstance(table, class_if_loaded("datasets", "Dataset")) or table.format["type"] == "custom":
        return None
    import pyarrow.compute as pc  # there with `datasets`
    from pyarrow import types

    schema = table.features.arrow_schema
    lists = [each.name for each in schema if types.is_list(each.type) or types.is_large_list(each.type)]
    if not lists:
        return None
    parts = [
        sum(pc.fill_null(pc.list_value_length(rows[name]), 0).to_numpy() for name in lists)
        for rows in table.with_format("arrow").iter(batch_size=ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)


def _read(loader: TrainLoader, indices: list[int]) -> list[Any]:
    """Read samples: in a worker where workers read, since a file that is opened here would be shared with them."""
    config, device = loader.config, loader.accelerator.device
    if config.dataloader_num_workers == 0 or isinstance(loader.dataset, class_if_loaded("datasets", "Dataset")):
        return [loader.dataset[i] for i in indices]
    options = {**worker_options(config, device), "num_workers": 1, "persistent_workers": False, "pin_memory": False}
    return list(DataLoader(Subset(loader.dataset, indices), batch_size=None, collate_fn=as_it_is, **options))


def elements_of(sample: Any) -> int:
    """Return the number of elements in a sample: in its tensors, arrays and lists; a text's letters, 1 of the rest."""
    if isinstance(sample, Mapping):
        return sum(elements_of(value) for value in sample.values())
    if isinstance(sample, torch.Tensor):
        return sample.numel()
    if isinstance(sample, np.ndarray):
        return sample.size
    return len(sample) if hasattr(sample, "__len__") else 1
