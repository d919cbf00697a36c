"""Predictions are kept whole, whatever their length."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.training.evaluation import _joined, _logits
from tests.benchmarks.contest import OURS, in_process
from tests.benchmarks.evaluation import LENGTH, WORDS
from tests.support.parity import TRAINING, history, run_harness


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


def test_the_keys_and_values_that_a_model_keeps_are_no_predictions(tmp_path: Path) -> None:
    short = {**TRAINING, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    for name in ("with", "without"):
        run_harness(tmp_path / name, {**short, "use_cache": name == "with"})
    assert history(tmp_path / "with") == history(tmp_path / "without")


def test_a_scalar_among_the_outputs_is_a_part_of_the_loss_and_no_prediction() -> None:
    logits = torch.ones(2, 3)
    given = {"loss": torch.tensor(1.0), "aux_loss": torch.tensor(0.1), "logits": logits}  # as Mixtral orders them
    assert _logits(given, []) is logits
    assert _logits(tuple(given.values()), []) is logits


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_logits_are_kept_however_many_sequences_are_evaluated() -> None:
    """In a process of its own; 500 sequences over a large vocabulary would take 800 MB."""
    found = in_process("tests.benchmarks.evaluation", OURS, "500")
    logits = 500 * LENGTH * WORDS * 4
    assert found["grown"] < 0.1 * logits
    assert 0 < found["accuracy"] < 1
