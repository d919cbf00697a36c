"""Lengths of samples, and groups of similar ones: those of transformers' sampler, without its lists."""

from __future__ import annotations

import itertools
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from harness.data.lengths import Grouped, measure, random_order


def test_groups_are_those_of_transformers_for_all_small_sizes_and_some_larger() -> None:
    sizes = [*itertools.product(range(1, 60), (1, 2, 3, 8)), (1601, 8), (5000, 4)]
    for samples, size in sizes:
        lengths = np.random.default_rng(samples).integers(1, 12, samples)  # many are equal
        expected = get_length_grouped_indices(lengths.tolist(), size, generator=torch.Generator().manual_seed(5))
        assert Grouped(lengths=lengths, size=size, seed=5).order().tolist() == expected, (samples, size)
        torch.manual_seed(6)
        expected = get_length_grouped_indices(lengths.tolist(), size)
        torch.manual_seed(6)
        assert Grouped(lengths=lengths, size=size, seed=None).order().tolist() == expected, (samples, size)


def test_a_random_order_is_torchs_in_half_the_memory() -> None:
    for size in (0, 1, 2, 1000, 300_000):
        expected = torch.randperm(size, generator=torch.Generator().manual_seed(size))
        found = random_order(size, torch.Generator().manual_seed(size))
        assert found.tolist() == expected.tolist()
        assert found.itemsize == 4


ROWS = {"input_ids": [[1], [2, 3], [], [4, 5, 6]], "labels": [[1, 2], [3], [4], [5]], "text": ["a", "bc", "", "d"]}


class Listed:
    """The same samples without a table, read one by one; beyond the last it does not raise."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: torch.tensor(values[index % 4]) for name, values in ROWS.items() if name != "text"}


def test_a_table_is_measured_as_its_samples_are() -> None:
    table = datasets.Dataset.from_dict(ROWS)
    expected = [[1, 2], [2, 1], [0, 1], [3, 1]]
    names = ("input_ids", "labels")
    assert measure(Listed(), names, column="length").tolist() == expected
    for rows in (table, table.with_format("torch"), table.with_format("numpy"), table.with_transform(dict)):
        assert measure(rows, names, column="length").tolist() == expected
    order = [3, 0, 0, 1]
    assert measure(table.select(order), names, column="length").tolist() == [expected[i] for i in order]
    assert measure(table, ["text"], column="length").tolist() == [[1], [2], [0], [1]]
    sized = table.add_column("length", [9, 8, 7, 6])  # type: ignore[call-arg]
    assert measure(sized, names, column="length").tolist() == [[9], [8], [7], [6]]


def test_a_transform_decides_what_a_sample_is() -> None:
    def doubled(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"input_ids": [each * 2 for each in rows["input_ids"]]}

    rows = datasets.Dataset.from_dict(ROWS).with_transform(doubled)
    assert measure(rows, ["input_ids", "labels"], column="length").tolist() == [[2], [4], [0], [6]]


@pytest.mark.parametrize(
    "rows",
    [
        datasets.Dataset.from_dict({"pixels": [[1]]}),
        datasets.Dataset.from_dict({"input_ids": [[1], None]}),
        datasets.Dataset.from_dict({"input_ids": [1, 2]}),
        [(1, 2)],
    ],
    ids=["other keys", "a missing list", "numbers", "no mapping"],
)
def test_samples_without_a_length_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"no input_ids"):
        measure(rows, ["input_ids"], column="length")
