"""Functions of a task that the loop calls: what they see, and where their values go."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.tasks import Task
from harness.train import main
from tests.support.launching import DDP, needs_fsdp
from tests.support.launching import FSDP2 as FSDP
from tests.support.measuring.syncs import syncs
from tests.support.parity import TRAINING, as_flags, assert_equal_weights, history, reset, run_harness
from tests.support.two_processes import finished, rows, trained

TASK = "tests.support.tasks.hooked_task:build"
SHORT: dict[str, Any] = {**TRAINING, "max_steps": 12, "logging_steps": 4}
SAVING = {"save_strategy": "steps", "save_steps": 5}
LOOPS = {"loss", "grad_norm", "learning_rate", "epoch", "step"}


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("harness.training.hooks")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def trains(folder: Path, **arguments: Any) -> list[dict[str, Any]]:
    run_harness(folder, {**SHORT, **arguments}, task=TASK)
    return history(folder)


def refused(folder: Path, capsys: pytest.CaptureFixture[str], **arguments: Any) -> str:
    reset()
    flags = {**SHORT, "task": TASK, "report_to": "none", "output_dir": folder, "use_cpu": True, **arguments}
    assert main(as_flags(flags)) == 2
    return capsys.readouterr().err


def test_values_stand_in_the_row_of_the_steps_report_or_in_one_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = trains(tmp_path / "run", task_args={"after_step": "third"})
    own = {"weight_norm", "of_step", "tokens"}
    assert [(event["step"], set(event)) for event in events[:-1]] == [
        (3, {*own, "epoch", "step"}),
        (4, LOOPS),
        (6, {*own, "epoch", "step"}),
        (8, LOOPS),
        (9, {*own, "epoch", "step"}),
        (12, {*LOOPS, *own}),
    ]
    assert [event["of_step"] for event in events if "of_step" in event] == [3, 6, 9, 12]
    assert all(isinstance(event["weight_norm"], float) for event in events if "weight_norm" in event)
    assert "step 3/12 (25 %)  weight_norm " in capsys.readouterr().out


def test_a_step_without_values_is_as_before(tmp_path: Path) -> None:
    plain = trains(tmp_path / "plain")
    events = trains(tmp_path / "hooked", task_args={"after_step": "third"})
    assert [event for event in events if "loss" in event and event["step"] < 12] == plain[:2]
    assert_equal_weights(tmp_path / "plain", tmp_path / "hooked")


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_function_knows_whether_a_report_is_due(strategy: str, tmp_path: Path) -> None:
    events = trains(tmp_path / "run", logging_strategy=strategy, max_steps=20, task_args={"after_step": "reports"})
    reported = [event["step"] for event in events if "loss" in event]
    assert (
        [event["step"] for event in events if "twice" in event]
        == reported
        == ([4, 8, 12, 16, 20], [15, 20])[strategy == "epoch"]
    )


def test_the_trackers_have_them_under_the_trainers_names(tmp_path: Path) -> None:
    trains(tmp_path / "run", task_args={"after_step": "third"}, report_to="wandb", wandb_mode="offline")
    found = [row for row in rows(tmp_path / "run") if "train/weight_norm" in row]
    assert [(row["train/global_step"], "train/loss" in row) for row in found] == [
        *((3, False), (6, False), (9, False), (12, True))
    ]
    expected = [event["weight_norm"] for event in history(tmp_path / "run") if "weight_norm" in event]
    assert [row["train/weight_norm"] for row in found] == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a number", "returned a float; return values by name"),
        ("a text", "returned a str as name; a value is a number"),
        ("a vector", "returned a Tensor of shape [2] as name"),
        ("no text", "returned a value called 3; a name is a text"),
        *((name, f"returned a value called {name}, which the loop writes") for name in ("loss", "step", "eval_loss")),
        *((name, f"returned a value called {name}, which the loop writes") for name in ("train/loss", "penalty")),
    ],
)
def test_what_is_no_value_is_refused_with_the_functions_name(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(tmp_path / "run", capsys, task_args={"after_step": name, "logged": ["penalty"]})
    (line,) = [line for line in error.splitlines() if line.startswith("harness train: ")]
    assert message in line
    assert "The task's after_step (tests.support.tasks.hooked_task.returning.<locals>.return_it)" in line


def test_values_that_are_not_finite_are_shown_and_told_once(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    events = trains(tmp_path / "run", max_steps=3, task_args={"after_step": "nan"})
    assert all(math.isnan(event["name"]) and event["other"] == math.inf for event in events[:-1])
    assert [record.getMessage().rpartition(" returned ")[2] for record in told.records] == [
        *("nan as name; it is recorded as it is.", "inf as other; it is recorded as it is.")
    ]


def test_numbers_of_other_libraries_are_numbers(tmp_path: Path) -> None:
    (first, *_) = trains(tmp_path / "run", max_steps=3, task_args={"after_step": "types"})
    assert {name: first[name] for name in ("half", "whole", "flag", "a/b")} == {
        "half": 0.5,
        "whole": 3,
        "flag": 1,
        "a/b": 1,
    }


def test_a_function_that_raises_is_named_and_the_run_can_go_on(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError, match="a bug in the hook"):
        trains(tmp_path / "run", task_args={"after_step": "fails"}, **SAVING)
    assert "The task's after_step (tests.support.tasks.hooked_task.fails_at_7) has failed:" in told.text
    resumed = {"resume_from_checkpoint": "true", "allow_changed_arguments": True}
    events = trains(tmp_path / "run", **SAVING, **resumed)
    assert events[:-1] == trains(tmp_path / "whole")[:-1]
    assert_equal_weights(tmp_path / "whole", tmp_path / "run")


# The scalars of a model's outputs.


def test_logged_outputs_are_means_over_the_global_batches_since_the_last_report(tmp_path: Path) -> None:
    each = trains(tmp_path / "each", logging_steps=1, task_args={"logged": ["penalty"]})
    fourth = trains(tmp_path / "fourth", logging_steps=4, task_args={"logged": ["penalty"]})
    single = [event["penalty"] for event in each if "penalty" in event]
    expected = [sum(single[i : i + 4]) / 4 for i in (0, 4, 8)]
    assert [event["penalty"] for event in fourth if "penalty" in event] == pytest.approx(expected, rel=1e-6)
    assert {"penalty", *LOOPS} == set(fourth[0])
    assert_equal_weights(tmp_path / "each", tmp_path / "fourth")


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_an_output_is_that_of_the_global_batch_however_it_is_split(accumulation: int, tmp_path: Path) -> None:
    """The penalty is a mean over the tokens that count, which each micro-batch has another number of."""
    size = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    quiet = {"max_steps": 3, "logging_steps": 1, "task_args": {"logged": ["penalty"], "dropout": 0.0}}
    whole, split = trains(tmp_path / "whole", **quiet), trains(tmp_path / "split", **size, **quiet)
    for one, other in zip(whole[:-1], split[:-1], strict=True):
        assert other["penalty"] == pytest.approx(one["penalty"], rel=1e-5)
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_logged_outputs_cost_no_wait_for_the_device(tmp_path: Path) -> None:
    counts = []
    for name, logged in (("without", []), ("with", ["penalty"])):
        with syncs("cpu") as found:
            trains(tmp_path / name, task_args={"logged": logged})
        counts.append([len([each for each in found if each.within(part)]) for part in ("train_step", "report")])
    assert counts[0] == counts[1]


def test_a_window_that_a_save_divides_is_reported_to_the_bit(tmp_path: Path) -> None:
    arguments = {"logging_steps": 4, "task_args": {"logged": ["penalty"], "after_step": "third"}, **SAVING}
    whole = trains(tmp_path / "whole", **arguments)
    checkpoint = tmp_path / "whole" / "checkpoint-10"
    assert trains(tmp_path / "on", **arguments, resume_from_checkpoint=checkpoint) == whole


@pytest.mark.parametrize(
    ("logged", "message"),
    [
        (["router_loss"], "name router_loss, and the model's outputs have it not, only: loss, logits, penalty, rows"),
        (["nothing"], "name nothing, and the model's outputs have it not"),
        (["rows"], "name rows, and the model's outputs have it as of shape [8, "),
        (["loss"], "name loss, which the loop writes itself"),
    ],
)
def test_outputs_that_can_not_be_logged_are_refused_before_a_step_is_made(
    logged: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(tmp_path / "run", capsys, task_args={"logged": logged})
    (line,) = [line for line in error.splitlines() if line.startswith("harness train: ")]
    assert message in line


# After an evaluation.


def evaluates(folder: Path, **arguments: Any) -> list[dict[str, Any]]:
    events = trains(folder, **{"eval_strategy": "steps", "eval_steps": 6, **arguments})
    return [event for event in events if any(name.startswith("eval_") for name in event)]


@pytest.mark.parametrize("sets", [1, 2])
def test_values_join_the_row_of_their_evaluation(sets: int, tmp_path: Path) -> None:
    given = {"after_evaluation": "perplexity", "logged": ["penalty"], "sets": sets}
    events = evaluates(tmp_path / "run", task_args=given, report_to="wandb", wandb_mode="offline")
    prefixes = ["eval"] if sets == 1 else ["eval_near", "eval_far"]
    assert len(events) == 2 * sets
    for event, prefix in zip(events, 2 * prefixes, strict=True):
        assert event[f"{prefix}_perplexity"] == math.exp(event[f"{prefix}_loss"])
        assert event[f"{prefix}_trained"] == 2
        assert f"{prefix}_accuracy" in event
    name = {"eval": "eval/perplexity", "eval_near": "eval/near_perplexity", "eval_far": "eval/far_perplexity"}
    shown = [row[name[each]] for row in rows(tmp_path / "run") for each in prefixes if name[each] in row]
    expected = zip(events, 2 * prefixes, strict=True)
    assert shown == [event[f"{prefix}_perplexity"] for event, prefix in expected]


def test_a_function_after_an_evaluation_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    plain = evaluates(tmp_path / "plain", task_args={"after_evaluation": "nothing", "logged": ["penalty"]})
    events = evaluates(tmp_path / "hooked", task_args={"after_evaluation": "perplexity", "logged": ["penalty"]})
    own = {"eval_perplexity", "eval_trained", "eval_probe"}
    assert [{name: value for name, value in event.items() if name not in own} for event in events] == plain
    assert_equal_weights(tmp_path / "plain", tmp_path / "hooked")


def test_an_evaluation_without_a_training_has_them_too(tmp_path: Path) -> None:
    run_harness(
        tmp_path / "run",
        {"do_eval": True, "task_args": {"after_evaluation": "perplexity", "logged": ["penalty"]}},
        task=TASK,
    )
    results = json.loads((tmp_path / "run" / "all_results.json").read_text(encoding="utf-8"))
    assert results["eval_perplexity"] == math.exp(results["eval_loss"])
    assert results["eval_trained"] == 0


@pytest.mark.parametrize("name", ["accuracy", "num_tokens", "eval_mine"])
def test_an_evaluations_own_names_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"eval_strategy": "epoch", "task_args": {"after_evaluation": name, "logged": ["penalty"]}}
    message = f"returned a value called {name}, which the evaluation has already"
    assert message in refused(tmp_path / "run", capsys, **given)


def test_the_best_model_is_chosen_by_a_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"eval_strategy": "epoch", "metric_for_best_model": "perplexity"}
    error = refused(tmp_path / "run", capsys, task_args={"after_evaluation": "perplexity"}, **given)
    assert "there are: eval_accuracy, eval_loss. The values of after_evaluation are not known before" in error


def test_a_task_has_no_functions_unless_it_brings_some() -> None:
    task = Task(model=None, train_dataset=None, data_collator=list)  # type: ignore[arg-type]
    assert (task.after_step, task.logged_outputs) == (None, ())


# On two processes.


@pytest.mark.slow
@pytest.mark.parametrize("config", [DDP, pytest.param(FSDP, marks=needs_fsdp)], ids=lambda path: path.stem)
def test_functions_may_be_collective_and_outputs_are_means_over_the_ranks(config: Path, tmp_path: Path) -> None:
    quiet = {"after_step": "mean", "logged": ["penalty"], "dropout": 0.0}
    arguments = {"max_steps": 6, "logging_steps": 3, "eval_strategy": "no", "save_steps": 5, "task": TASK}
    folder = finished(config, tmp_path, **arguments, task_args=quiet)
    events = history(folder)
    assert [event["step"] for event in events if "mean_length" in event] == [1, 2, 3, 4, 5, 6]
    assert {event["ranks"] for event in events if "ranks" in event} == {2}
    # 2 processes of 2 x 2 samples see the same global batches as one of 4 x 2.
    one = {**arguments, "save_strategy": "no", "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
    alone = trains(tmp_path / "alone", **one, task_args=quiet)
    assert [event["penalty"] for event in events if "penalty" in event] == pytest.approx(
        [event["penalty"] for event in alone if "penalty" in event], rel=1e-4
    )
    resumed = trained(config, tmp_path, **arguments, task_args=quiet, resume_from_checkpoint=folder / "checkpoint-5")
    assert resumed.code == 0, resumed.err[-2000:]
    assert history(folder) == events
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 6
