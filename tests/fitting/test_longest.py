"""Which samples are tried: those that take most memory, as far as that is known."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator

from harness.data.flags import DataConfig
from harness.data.loader import TrainLoader
from harness.data.samples import Samples
from harness.fitting.longest import MOST_READ, elements_of, longest_samples


class Counted:
    """Samples of one tensor as long as `lengths` says; `read` are the indices that were asked for."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.read = lengths, list[int]()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        return {"input_ids": torch.full((self.lengths[index],), index)}


def loader(dataset: Any, **options: Any) -> TrainLoader:
    samples = Samples(dataset=dataset, collate=lambda found: {"found": found})
    return TrainLoader(samples, DataConfig(**options), Accelerator(cpu=True), seed=0)


def test_few_samples_are_all_measured() -> None:
    data = Counted([3, 9, 1, 9, 5])
    assert [int(each["input_ids"][0]) for each in longest_samples(loader(data), 3)] == [1, 3, 4]
    assert [len(each["input_ids"]) for each in longest_samples(loader(data), 7)] == [9, 9, 5, 3, 1, 9, 9]


def test_of_many_samples_some_are_measured_from_the_first_to_the_last() -> None:
    data = Counted([1] * 49_999 + [7])
    assert len(longest_samples(loader(data), 1)[0]["input_ids"]) == 7
    assert len(data.read) == MOST_READ
    assert data.read[0] == 0


@pytest.mark.parametrize("selected", [False, True], ids=["whole", "selected"])
def test_all_rows_of_a_table_are_measured_without_being_read(selected: bool) -> None:
    ids = [[0] * 2] * 30_000
    ids[17_001] = [7] * 9
    table = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "name": ["x"] * 30_000})
    if selected:
        table = table.select(range(16_000, 18_000))
    assert longest_samples(loader(table), 2)[0]["input_ids"] == [7] * 9


def test_workers_read_where_workers_are_to_read() -> None:
    data = Counted([3, 9, 1])
    found = longest_samples(loader(data, dataloader_num_workers=2), 2)
    assert [len(each["input_ids"]) for each in found] == [9, 3]
    assert data.read == []


def test_elements_of_a_sample_are_counted_over_all_it_holds() -> None:
    assert elements_of({"pixels": torch.zeros(3, 4), "ids": [1, 2], "text": "abc", "label": 1}) == 12 + 2 + 3 + 1
