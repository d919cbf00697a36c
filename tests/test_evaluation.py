"""Predictions are kept whole, whatever their length."""

from __future__ import annotations

import numpy as np
import torch

from harness.evaluation import _joined


def test_predictions_of_unequal_length_are_padded_to_the_longest() -> None:
    joined = _joined([torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6, 7]])])
    assert np.array_equal(joined, [[1, 2, -100], [3, 4, -100], [5, 6, 7]])


def test_logits_of_unequal_length_are_padded_in_their_second_dimension() -> None:
    joined = _joined([torch.ones(1, 2, 3), torch.ones(2, 4, 3)])
    assert joined.shape == (3, 4, 3)
    assert (joined[0, 2:] == -100).all()
    assert (joined[1:] == 1).all()


def test_predictions_of_one_value_a_sample_stay_as_they_are() -> None:
    assert np.array_equal(_joined([torch.tensor([1, 2]), torch.tensor([3])]), [1, 2, 3])
