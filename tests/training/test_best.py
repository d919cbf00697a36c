"""Which evaluation was the best, and when to stop: the Trainer's rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from harness.errors import ConfigError
from harness.training.best import BestModel
from harness.training.flags import BestConfig
from harness.training.state import TrainState


def best_of(values: list[float], metric: str = "eval_loss", **options: Any) -> tuple[list[bool], TrainState]:
    config, state = BestConfig(metric_for_best_model=metric, **options), TrainState()
    best, found = BestModel(config, metric=metric, keeps_checkpoints=True), []
    for step, value in enumerate(values, start=1):
        state.global_step = step
        found.append(best.update({metric: value}, state))
        if state.should_stop:
            break
    return found, state


def test_an_equal_evaluation_is_not_better() -> None:
    found, state = best_of([2.0, 2.0, 1.0, 1.0, 1.5])
    assert found == [True, False, True, False, False]
    assert (state.best_metric, state.best_global_step) == (1.0, 3)


def test_nan_is_never_the_best_and_never_keeps_a_better_one_out() -> None:
    found, state = best_of([math.nan, 3.0, math.nan, 2.0])
    assert found == [False, True, False, True]
    assert (state.best_metric, state.best_global_step) == (2.0, 4)


@pytest.mark.parametrize(
    ("metric", "options", "expected"),
    [
        ("eval_loss", {}, [True, False, True]),
        ("eval_accuracy", {}, [True, True, False]),
        ("eval_near_loss", {}, [True, False, True]),
        ("eval_accuracy", {"greater_is_better": False}, [True, False, True]),
        ("eval_loss", {"greater_is_better": True}, [True, True, False]),
    ],
)
def test_direction_follows_the_name_unless_it_is_given(
    metric: str, options: dict[str, Any], expected: list[bool]
) -> None:
    assert best_of([2.0, 3.0, 1.0], metric, **options)[0] == expected


def test_without_a_metric_nothing_is_the_best() -> None:
    state = TrainState()
    best = BestModel(BestConfig(), metric=None, keeps_checkpoints=True)
    assert best.update({"eval_loss": 1.0}, state) is False
    assert state.best_metric is None


def test_without_checkpoints_no_step_is_named() -> None:
    state = TrainState(global_step=4)
    best = BestModel(BestConfig(), metric="eval_loss", keeps_checkpoints=False)
    assert best.update({"eval_loss": 1.0}, state)
    assert (state.best_metric, state.best_global_step) == (1.0, None)


SERIES = {
    "falls": [5, 4, 3, 2, 1],
    "flat": [3, 3, 3, 3, 3, 3],
    "rises": [1, 2, 3, 4, 5],
    "small steps": [3, 2.95, 2.9, 2.85, 2.8],
    "up and down": [3, 4, 2, 4, 5, 6, 1],
    "not a number": [3, math.nan, 2, math.nan, math.nan, math.nan],
    "not a number first": [math.nan, math.nan, math.nan, 2.0],
}


@pytest.mark.parametrize("series", SERIES)
@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_patience_is_the_callbacks(series: str, patience: int, threshold: float, tmp_path: Any) -> None:
    values = [float(value) for value in SERIES[series]]
    stopping = {"early_stopping_patience": patience, "early_stopping_threshold": threshold}
    found, state = best_of(values, **stopping)
    # What the Trainer does: the callback at the evaluation, then its own comparison.
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        metric_for_best_model="loss",
        eval_strategy="epoch",
        greater_is_better=False,
    )
    callback, theirs, control, evaluations = EarlyStoppingCallback(**stopping), TrainerState(), TrainerControl(), 0
    for value in values:
        callback.on_evaluate(args, theirs, control, metrics={"eval_loss": value})
        if theirs.best_metric is None:
            theirs.best_metric = float("inf")
        if value < theirs.best_metric:
            theirs.best_metric = value
        evaluations += 1
        if control.should_training_stop:
            break
    assert len(found) == evaluations
    assert state.early_stopping_patience_counter == callback.early_stopping_patience_counter
    assert (state.should_stop, state.best_metric) == (control.should_training_stop, theirs.best_metric)


@pytest.mark.parametrize(
    ("options", "wanted", "name"),
    [
        ({}, False, None),
        ({}, True, "eval_loss"),
        ({"load_best_model_at_end": True}, False, "eval_loss"),
        ({"metric_for_best_model": "accuracy"}, False, "eval_accuracy"),
        ({"metric_for_best_model": "eval_accuracy"}, False, "eval_accuracy"),
    ],
)
def test_metric_is_named_with_its_prefix(options: dict[str, Any], wanted: bool, name: str | None) -> None:
    assert BestConfig(**options).metric(wanted=wanted) == name


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"early_stopping_patience": 0}, "--early_stopping_patience=0"),
        ({"early_stopping_patience": 1, "early_stopping_threshold": -1.0}, "--early_stopping_threshold=-1"),
        ({"early_stopping_threshold": 0.1}, "without --early_stopping_patience"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        BestConfig(**values)
