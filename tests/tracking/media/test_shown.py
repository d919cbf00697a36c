"""What a run has shown beside its numbers is counted by kind, over attempts, and said at the end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harness.errors import ConfigError
from harness.flags import parse
from harness.tracking.media.shown import HISTOGRAMS, PREDICTIONS, Shown
from tests.support.parity import TASK


def row(step: int, *names: str) -> dict[str, Any]:
    return {**dict.fromkeys(names, 1), "train/global_step": step}


def test_each_kind_is_counted_with_the_step_of_its_last_row() -> None:
    shown = Shown()
    assert shown.describe() == ""
    assert shown.describe([PREDICTIONS, HISTOGRAMS]) == "histograms: none; tables of predictions: none"
    shown.add(row(1, "train/loss"), has_histograms=False)
    shown.add(row(20, "sample_predictions_a", "sample_predictions_b", "confusion_matrix_a"), has_histograms=False)
    shown.add(row(30, "train/loss"), has_histograms=True)
    shown.add(row(40, "generated_texts"), has_histograms=True)
    shown.add(row(50, "sample_predictions"), has_histograms=False)
    assert shown.describe() == (
        "histograms: 2, the last with step 40; tables of predictions: 2, the last with step 50; "
        "tables of texts: 1, the last with step 40"
    )


def test_a_later_attempt_goes_on_from_the_checkpoints_counts() -> None:
    before, after = Shown(), Shown()
    before.add(row(20, "sample_predictions"), has_histograms=False)
    saved = json.loads(json.dumps(before.state_dict()))
    before.add(row(30, "sample_predictions"), has_histograms=False)  # lost: it is made again
    after.load_state_dict({**saved, "another kind": 1, HISTOGRAMS: {"count": "many"}})
    after.add(row(30, "sample_predictions"), has_histograms=False)
    assert after.describe() == before.describe() == "tables of predictions: 2, the last with step 30"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--wandb_eval_samples_steps", "5"], "does nothing without --wandb_eval_samples"),
        (["--wandb_eval_samples", "3", "--wandb_eval_samples_steps", "0"], "--wandb_eval_samples_steps=0"),
    ],
)
def test_tables_by_steps_that_cannot_come_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(["--task", TASK, *flags])
