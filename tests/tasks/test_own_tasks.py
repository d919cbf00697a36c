"""Tasks of a user's own: what a builder, a loss and a metric may be, and what is refused in one line."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from harness.train import main
from tests.support.inputs import label_flags, save_bert_tokenizer, write_text
from tests.support.parity import (
    TRAINING,
    as_flags,
    assert_equal_runs,
    history,
    needs_trainer,
    run_harness,
    run_trainer,
)

OWN = "tests.support.tasks.own_tasks"
SHORT = {**TRAINING, "max_steps": 2}


def refusal(capfd: pytest.CaptureFixture[str], folder: Path, builder: str, **arguments: Any) -> str:
    """The one line that a training of it ends with, before its first step."""
    flags = as_flags(
        {**SHORT, "task": f"{OWN}:{builder}", "report_to": "none", "output_dir": folder / "out", **arguments}
    )
    assert main([*flags, "--use_cpu"]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("harness train:")]
    return line


@pytest.mark.parametrize("own", [False, True], ids=["the model's", "compute_loss_func's"])
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("none", "None"),
        ("nothing", "None"),
        ("a vector", "(8,)"),
        ("a number", "float"),
        ("a text", "str"),
        ("detached", "gradient"),
        ("whole numbers", "int64"),
    ],
)
def test_a_loss_that_nothing_can_be_learnt_of_is_refused(
    own: bool, kind: str, what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capfd, tmp_path, "with_loss", task_args={"loss": kind, "own": own})
    assert what in said
    assert ("compute_loss_func" if own else "Regression") in said


@pytest.mark.parametrize("kind", ["a tuple of none", "an empty tuple", "no key", "a bare tensor"])
def test_outputs_without_a_loss_are_refused(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refusal(capfd, tmp_path, "with_loss", task_args={"loss": kind})
    assert "Regression" in said
    assert '"loss"' in said


def test_a_loss_of_one_element_is_a_scalar(tmp_path: Path) -> None:
    for kind in ("scalar", "one element", "tuple"):
        for own in (False, True) if kind != "tuple" else (False,):
            task_args = {"loss": kind, "own": own}
            run_harness(
                tmp_path / f"{kind} {own}", SHORT, task=f"{OWN}:with_loss", task_config={"task_args": task_args}
            )
    expected = history(tmp_path / "scalar False")
    assert len(expected) == 3
    for name in ("one element False", "tuple False", "scalar True", "one element True"):
        assert history(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("builder", "what"),
    [
        ("nothing", "None"),
        ("a_model", "GPT2LMHeadModel"),
        ("the_class", "the class Task"),
        ("incomplete", "'train_dataset' and 'data_collator'"),
        ("misspelt", "train_data"),
        ("no_model", "model"),
        ("no_collator", "data_collator"),
        ("sharded_at_load", "sharded when it was loaded"),
        ("a_number_of_samples", "train_dataset"),
        ("metrics_made_already", "metrics"),
        ("metrics_of_the_trainer", "metrics"),
        ("metrics_without_names", "names"),
        ("not_callable", "compute_loss_func"),
        ("A_NUMBER", "no function"),
    ],
)
def test_what_a_builder_forgets_is_said_by_its_name(
    builder: str, what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capfd, tmp_path, builder)
    assert f"--task={OWN}:{builder}" in said
    assert what in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("float", 0.25),
        ("numpy float32", 0.25),
        ("numpy int64", 3.0),
        ("numpy array", 0.25),
        ("tensor", 0.25),
        ("tensor bf16", 0.25),
        ("int", 3.0),
        ("bool", 1.0),
        ("numpy bool", 1.0),
        ("nan", math.nan),
        ("numpy nan", math.nan),
    ],
)
def test_whatever_is_one_number_is_a_metric(kind: str, value: float, tmp_path: Path) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"metric_for_best_model": "value", "load_best_model_at_end": True}
    out = tmp_path / "out"
    run_harness(
        out,
        {**SHORT, **evaluated, **best, "do_train": True, "do_eval": True},
        task=f"{OWN}:with_metric",
        task_config={"task_args": {"metric": kind}},
    )
    state = json.loads((out / "trainer_state.json").read_text())
    found = [row["eval_value"] for row in state["log_history"] if "eval_value" in row]
    results = json.loads((out / "all_results.json").read_text())["eval_value"]
    assert all(isinstance(each, float) for each in (*found, results))
    assert len(found) == 2
    if math.isnan(value):
        assert all(math.isnan(each) for each in (*found, results))
    else:
        assert {*found, results, state["best_metric"]} == {value}


@pytest.mark.parametrize("kind", ["none", "text", "list", "array", "tensors", "complex"])
def test_a_metric_that_is_no_number_is_refused_by_its_name(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capfd, tmp_path, "with_metric", task_args={"metric": kind}, eval_on_start=True)
    assert "'value'" in said


def test_a_metric_that_was_announced_and_is_not_there_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task_args = {"metric": "float", "names": ["value", "f1"]}
    said = refusal(capfd, tmp_path, "with_metric", task_args=task_args, eval_on_start=True)
    assert "'f1'" in said


@pytest.mark.parametrize("names", [["targets"], ["targets", "others"]], ids=" ".join)
@needs_trainer
def test_labels_of_any_name_are_evaluated_as_by_the_trainer(names: list[str], tmp_path: Path) -> None:
    arguments = {**TRAINING, "eval_strategy": "steps", "eval_steps": 2, "label_names": names}
    given = {"task": f"{OWN}:with_targets", "task_config": {"task_args": {"several": len(names) > 1}}}
    run_trainer(tmp_path / "trainer", {**arguments, "metric_for_best_model": "largest_error"}, **given)
    run_harness(tmp_path / "ours", {**arguments, "metric_for_best_model": "largest_error"}, **given)
    assert_equal_runs(tmp_path / "trainer", tmp_path / "ours")
    evaluations = [row for row in history(tmp_path / "ours") if "eval_loss" in row]
    assert len(evaluations) == 3
    assert all(row["eval_largest_error"] > 0 for row in evaluations)


def test_label_names_keep_their_columns_for_the_collator(tmp_path: Path) -> None:
    arguments = {**TRAINING, "max_steps": 2, "label_names": ["wanted"], "eval_strategy": "steps", "eval_steps": 2}
    run_harness(tmp_path / "ours", arguments, task=f"{OWN}:with_renamed_targets")
    assert "eval_loss" in history(tmp_path / "ours")[2]


def test_label_names_that_no_batch_has_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = {"label_names": ["targets", "other"], "eval_on_start": True}
    said = refusal(capfd, tmp_path, "with_targets", **names)
    assert "--label_names=targets other" in said
    assert "x, targets" in said
    smoothed = refusal(capfd, tmp_path, "with_targets", label_names=["targets"], label_smoothing_factor=0.1)
    assert "--label_smoothing_factor=0.1" in smoothed


def test_a_forward_without_labels_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("harness.build")
    logger.addHandler(caplog.handler)
    try:
        run_harness(tmp_path / "ours", SHORT, task=f"{OWN}:with_targets")
    finally:
        logger.removeHandler(caplog.handler)
    assert "Targets.forward has no argument with `label` in its name" in caplog.text
    assert "--label_names" in caplog.text


@needs_trainer
@pytest.mark.parametrize("scaling", ["trainer", "global"])
def test_a_loss_without_labels_is_evaluated_where_the_model_returns_it(scaling: str, tmp_path: Path) -> None:
    arguments = {**TRAINING, "eval_strategy": "steps", "eval_steps": 3}
    given = {"task": f"{OWN}:with_return_loss"}
    run_trainer(tmp_path / "trainer", arguments, **given)
    run_harness(tmp_path / "ours", {**arguments, "loss_scaling": scaling}, **given)
    assert_equal_runs(tmp_path / "trainer", tmp_path / "ours")
    assert history(tmp_path / "ours")[3]["eval_loss"] > 0


@needs_trainer
def test_a_model_without_a_config_may_call_an_output_as_a_cache_is_called(tmp_path: Path) -> None:
    arguments = {**TRAINING, "eval_strategy": "steps", "eval_steps": 3, "label_names": ["targets"]}
    given = {"task": f"{OWN}:with_output_named_cache"}
    run_trainer(tmp_path / "trainer", arguments, **given)
    run_harness(tmp_path / "ours", arguments, **given)
    assert_equal_runs(tmp_path / "trainer", tmp_path / "ours")
    assert history(tmp_path / "ours")[3]["eval_largest_error"] > 0


def test_a_batch_in_which_nothing_is_masked_counts_as_zero(tmp_path: Path) -> None:
    tokenizer = save_bert_tokenizer(tmp_path / "bert")
    flags = label_flags(tokenizer, write_text(tmp_path / "text.txt"))[1:]
    masked = ["--task=masked-lm", "--mlm_probability=0.02", "--max_seq_length=8", "--per_device_train_batch_size=1"]
    quick = ["--max_steps=12", "--logging_steps=1", "--logging_nan_inf_filter=false", "--report_to=none", "--use_cpu"]
    assert main([*flags, *masked, *quick, "--save_strategy=no", f"--output_dir={tmp_path / 'out'}"]) == 0
    found = [row["loss"] for row in history(tmp_path / "out") if "loss" in row]
    assert found.count(0.0) > 3
    assert all(map(math.isfinite, found))
