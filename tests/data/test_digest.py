"""A data set is told from another by a few of its samples, and nothing else is touched."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from harness.data.digest import NUM_SAMPLES, digest_of_samples
from harness.training import rng


class Touched(list[Any]):
    """A list that remembers what was read."""

    def __init__(self, values: Any) -> None:
        super().__init__(values)
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        return super().__getitem__(index)


def test_few_samples_are_read_evenly_with_the_first_and_the_last() -> None:
    data = Touched(range(1001))
    assert digest_of_samples(data) is not None
    assert len(data.read) == NUM_SAMPLES + 1
    assert (data.read[0], data.read[NUM_SAMPLES - 1], data.read[-1]) == (0, 1000, 0)
    gaps = np.diff(data.read[:NUM_SAMPLES])
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_small_data_has_a_digest_too(size: int) -> None:
    assert digest_of_samples(list(range(size))) == digest_of_samples(list(range(size)))


SAMPLES = [
    {"input_ids": [1, 2, 3], "label": 0},
    {"input_ids": [1, 2, 4], "label": 0},
    {"input_ids": [1, 2, 3], "label": 1},
    {"input_ids": [1, 2, 3], "labels": 0},
    {"input_ids": torch.tensor([1, 2, 3]), "label": 0},
    {"input_ids": torch.tensor([1, 2, 3], dtype=torch.int32), "label": 0},
    {"input_ids": torch.tensor([[1, 2, 3]]), "label": 0},
    {"input_ids": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16), "label": 0},
    {"input_ids": torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16), "label": 0},
    {"input_ids": np.array([1, 2, 3]), "label": 0},
    {"input_ids": np.array([1, 2, 5]), "label": 0},
    {"input_ids": np.array(["a", None], dtype=object), "label": 0},
    {"input_ids": np.array(["b", None], dtype=object), "label": 0},
    {"text": "a"},
    {"text": "b"},
    {"text": b"b"},
    {"text": None},
    {"text": 1.5},
    ([1], [2, 3]),
    ([1, 2], [3]),
    torch.tensor(1),
    torch.tensor(2),
]


def test_any_difference_in_a_sample_is_another_digest() -> None:
    digests = [digest_of_samples([sample]) for sample in SAMPLES]
    assert None not in digests
    assert len(set(digests)) == len(SAMPLES)
    assert digests == [digest_of_samples([sample]) for sample in SAMPLES]
    assert digest_of_samples([SAMPLES[0], SAMPLES[1]]) != digest_of_samples([SAMPLES[1], SAMPLES[0]])


def test_the_order_of_the_keys_is_no_difference() -> None:
    assert digest_of_samples([{"a": 1, "b": 2}]) == digest_of_samples([{"b": 2, "a": 1}])


def test_an_object_without_content_counts_by_its_name() -> None:
    assert digest_of_samples([object()]) == digest_of_samples([object()])


class AtRandom(list[Any]):
    def __getitem__(self, index: Any) -> Any:
        return [random.random(), np.random.rand(), torch.rand(1).item()]


def test_samples_that_are_drawn_at_random_are_alike_and_move_no_generator() -> None:
    rng.seed_everything(7, full_determinism=False)
    found = digest_of_samples(AtRandom([0, 0]))
    after = [random.random(), np.random.rand(), torch.rand(1).item()]
    rng.seed_everything(7, full_determinism=False)
    assert after == [random.random(), np.random.rand(), torch.rand(1).item()]
    assert found is not None
    assert found == digest_of_samples(AtRandom([0, 0]))


def test_what_reads_otherwise_each_time_has_no_digest() -> None:
    class OwnGenerator(list[Any]):
        generator = np.random.default_rng(0)

        def __getitem__(self, index: Any) -> Any:
            return self.generator.random()

    assert digest_of_samples(OwnGenerator([0, 0])) is None


def test_what_cannot_be_read_has_no_digest() -> None:
    class Broken(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            raise OSError("gone")

    assert digest_of_samples(Broken([0])) is None
