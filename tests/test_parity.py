"""The same numbers as transformers.Trainer, to the last bit, from the same flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.parity import (
    AS_TRAINER,
    CASES,
    EVERY_4,
    EVERY_EPOCH,
    TRAINING,
    assert_equal_runs,
    assert_equal_weights,
    history,
    keys_of_history,
    needs_trainer,
    run_harness,
    run_trainer,
    without_ours,
)

pytestmark = needs_trainer


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_history_and_weights_are_the_trainers(name: str, tmp_path: Path) -> None:
    arguments = {**TRAINING, **CASES[name]}
    run_trainer(tmp_path / "trainer", arguments)
    run_harness(tmp_path / "ours", arguments)
    assert_equal_runs(tmp_path / "trainer", tmp_path / "ours")
    assert keys_of_history(tmp_path / "trainer") == keys_of_history(tmp_path / "ours")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.keys() >= AS_TRAINER.keys()])
def test_by_default_the_loss_of_evaluations_alone_is_another(name: str, tmp_path: Path) -> None:
    by_default = without_ours({**TRAINING, **CASES[name]})
    run_trainer(tmp_path / "trainer", by_default)
    run_harness(tmp_path / "ours", by_default)
    assert_equal_weights(tmp_path / "trainer", tmp_path / "ours")
    expected, found = history(tmp_path / "trainer"), history(tmp_path / "ours")
    assert any("eval_loss" in event for event in expected)
    for theirs, event in zip(expected, found, strict=True):
        assert {name for name in theirs if event[name] != theirs[name]} == {"eval_loss"} & theirs.keys()
        assert event.get("eval_loss", 0.0) == pytest.approx(theirs.get("eval_loss", 0.0), rel=2e-3)


def test_accumulation_multiplies_the_loss_of_a_bert_as_in_the_trainer_on_request_only(tmp_path: Path) -> None:
    of_bert = {"task_args": {"case": "BERT, sequence classification", "size": 37}}
    given: dict[str, Any] = {"task": "tests.training.layouts.tasks:build", "task_config": of_bert}
    whole = {**TRAINING, "max_steps": 10, "eval_strategy": "steps", "eval_steps": 5}
    split = {**whole, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    run_trainer(tmp_path / "whole", whole, **given)
    run_trainer(tmp_path / "split", split, **given)
    run_harness(tmp_path / "on request", {**split, **AS_TRAINER}, **given)
    run_harness(tmp_path / "default", split, **given)
    run_harness(tmp_path / "default, whole", whole, **given)
    assert_equal_runs(tmp_path / "split", tmp_path / "on request")
    assert_equal_runs(tmp_path / "whole", tmp_path / "default, whole")
    expected, found = history(tmp_path / "whole"), history(tmp_path / "default")
    # total_flos counts padding, which is another in smaller batches.
    assert found[:-1] == [pytest.approx(event, rel=1e-5) for event in expected[:-1]]
    doubled = history(tmp_path / "split")[0]
    assert [doubled[name] for name in ("loss", "grad_norm")] == [
        pytest.approx(2 * expected[0][name], rel=1e-5) for name in ("loss", "grad_norm")
    ]


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"llama": True}, {"gradient_accumulation_steps": 2}),
        ({"random_collator": True}, {"gradient_accumulation_steps": 2, **EVERY_EPOCH}),
        ({"sets": 2}, {**EVERY_EPOCH, "metric_for_best_model": "far_loss", "load_best_model_at_end": True}),
    ],
    ids=["shifted count of a Llama", "random collator", "two evaluation sets"],
)
def test_other_models_and_data_are_the_trainers(options: Any, arguments: Any, tmp_path: Path) -> None:
    arguments = {**TRAINING, **arguments}
    run_trainer(tmp_path / "trainer", arguments, task_config={"task_args": options})
    run_harness(tmp_path / "ours", arguments, task_config={"task_args": options})
    assert_equal_runs(tmp_path / "trainer", tmp_path / "ours")


def test_early_stopping_is_the_callbacks(tmp_path: Path) -> None:
    arguments = {**TRAINING, **EVERY_4, "metric_for_best_model": "loss", "learning_rate": 5e-2, "num_train_epochs": 4}
    stopping = {"early_stopping_patience": 2, "early_stopping_threshold": 0.01}
    run_trainer(tmp_path / "trainer", arguments, early_stopping=stopping)
    run_harness(tmp_path / "ours", {**arguments, **stopping})
    assert_equal_runs(tmp_path / "trainer", tmp_path / "ours")
    steps = json.loads((tmp_path / "ours" / "trainer_state.json").read_text())["global_step"]
    assert steps < 60, "it never stopped early, so nothing was compared"


def test_checkpoints_hold_the_trainers_files_and_state(tmp_path: Path) -> None:
    arguments = {**TRAINING, **EVERY_EPOCH, "load_best_model_at_end": True}
    run_trainer(tmp_path / "trainer", arguments)
    run_harness(tmp_path / "ours", arguments)
    for theirs in sorted((tmp_path / "trainer").glob("checkpoint-*")):
        ours = tmp_path / "ours" / theirs.name
        names = {path.name for path in ours.iterdir()}
        # Its arguments are pickled: nobody can load them safely, and no resume needs them.
        assert {path.name for path in theirs.iterdir()} - names == {"training_args.bin"}
        assert names - {path.name for path in theirs.iterdir()} == {"harness_state.json", "metrics.jsonl"}
        a, b = (json.loads((folder / "trainer_state.json").read_text()) for folder in (theirs, ours))
        for state in (a, b):
            del state["log_history"]
            state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
        assert a == b


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "logging_steps": 3},
        {"random_collator": True},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 1},
        {"include_num_input_tokens_seen": "all", "logging_steps": 4},
        {
            "eval_strategy": "steps",
            "eval_steps": 4,
            "metric_for_best_model": "loss",
            "include_num_input_tokens_seen": "all",
            **AS_TRAINER,
        },
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_resume_in_mid_epoch_is_the_uninterrupted_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    options = dict(options)
    task_config = {"task_args": {"random_collator": options.pop("random_collator", False)}}
    arguments = {**TRAINING, "save_strategy": "steps", "save_steps": 5, **options}
    run_trainer(tmp_path / "trainer", arguments, task_config=task_config)
    run_harness(tmp_path / "ours", arguments, task_config=task_config)
    for step in (5, 10, 15):
        resumed = tmp_path / f"resumed-{step}"
        resume = {"resume_from_checkpoint": tmp_path / "ours" / f"checkpoint-{step}"}
        run_harness(resumed, {**arguments, **resume}, task_config=task_config)
        assert_equal_runs(tmp_path / "trainer", resumed)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_checkpoints_cross_between_the_two(accumulation: int, tmp_path: Path) -> None:
    arguments = {**TRAINING, "save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": accumulation}
    run_trainer(tmp_path / "trainer", arguments)
    run_harness(tmp_path / "ours", arguments)
    assert_equal_runs(tmp_path / "trainer", tmp_path / "ours")
    ours_from_theirs, theirs_from_ours = tmp_path / "ours-from-theirs", tmp_path / "theirs-from-ours"
    theirs = tmp_path / "trainer" / "checkpoint-5"
    run_harness(ours_from_theirs, {**arguments, "resume_from_checkpoint": theirs})
    run_trainer(theirs_from_ours, arguments, resume=str(tmp_path / "ours" / "checkpoint-5"))
    for folder in (ours_from_theirs, theirs_from_ours):
        assert_equal_weights(tmp_path / "trainer", folder)
        # train_loss is of the steps that a Trainer's checkpoint does not hold.
        assert history(folder)[:-1] == history(tmp_path / "trainer")[:-1]


def test_a_resumed_end_ends_again_and_more_steps_go_on(tmp_path: Path) -> None:
    arguments = {**TRAINING, "max_steps": 8, "lr_scheduler_type": "constant", "save_strategy": "epoch"}
    run_harness(tmp_path / "short", arguments)
    run_trainer(tmp_path / "long", {**arguments, "max_steps": 20})
    resume = {"resume_from_checkpoint": tmp_path / "short" / "checkpoint-8"}
    run_harness(tmp_path / "again", {**arguments, **resume})
    assert_equal_runs(tmp_path / "short", tmp_path / "again")
    run_harness(tmp_path / "on", {**arguments, **resume, "max_steps": 20})
    assert_equal_runs(tmp_path / "long", tmp_path / "on")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_a_compiled_model_has_the_trainers_numbers(tmp_path: Path) -> None:
    arguments = {**TRAINING, **EVERY_4, "torch_compile_backend": "aot_eager", "max_steps": 6}
    run_trainer(tmp_path / "trainer", arguments)
    run_harness(tmp_path / "ours", arguments)
    assert_equal_runs(tmp_path / "trainer", tmp_path / "ours")


def test_a_resume_after_early_stopping_repeats_nothing(tmp_path: Path) -> None:
    stopping = {"metric_for_best_model": "accuracy", "early_stopping_patience": 1}
    arguments = {**TRAINING, **EVERY_EPOCH, **stopping, "learning_rate": 0.0, "num_train_epochs": 4}
    run_harness(tmp_path / "whole", arguments)
    last = tmp_path / "whole" / "checkpoint-30"
    assert not (tmp_path / "whole" / "checkpoint-45").exists(), "it never stopped early, so nothing was compared"
    run_harness(tmp_path / "again", {**arguments, "resume_from_checkpoint": last})
    assert_equal_runs(tmp_path / "whole", tmp_path / "again")


def test_a_data_skip_that_is_ignored_begins_where_the_trainer_begins(tmp_path: Path) -> None:
    arguments = {**TRAINING, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 5}
    run_harness(tmp_path / "ours", arguments)
    for step in (10, 15):
        checkpoint = tmp_path / "ours" / f"checkpoint-{step}"
        skipped = {**arguments, "ignore_data_skip": True}
        run_trainer(tmp_path / f"trainer-{step}", skipped, resume=str(checkpoint))
        run_harness(tmp_path / f"ours-{step}", {**skipped, "resume_from_checkpoint": checkpoint})
        theirs, found = history(tmp_path / f"trainer-{step}"), history(tmp_path / f"ours-{step}")
        assert [entry["epoch"] for entry in found] == [entry["epoch"] for entry in theirs]
        assert found[:-1] == theirs[:-1]


@pytest.mark.parametrize("options", [{"random_collator": False}, {"random_collator": True}], ids=["plain", "random"])
def test_a_stream_is_the_trainers_and_resumes_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    task_config = {"task_args": {"stream": True, **options}}
    arguments = {
        **TRAINING,
        "max_steps": 20,
        "gradient_accumulation_steps": 1,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    run_trainer(tmp_path / "trainer", arguments, task_config=task_config)
    run_harness(tmp_path / "ours", arguments, task_config=task_config)
    assert_equal_weights(tmp_path / "trainer", tmp_path / "ours")
    assert [entry["loss"] for entry in history(tmp_path / "ours")[:-1]] == [
        entry["loss"] for entry in history(tmp_path / "trainer")[:-1]
    ]
    for step in (6, 12, 18):
        resumed = tmp_path / f"resumed-{step}"
        resume = {"resume_from_checkpoint": tmp_path / "ours" / f"checkpoint-{step}"}
        run_harness(resumed, {**arguments, **resume}, task_config=task_config)
        assert_equal_runs(tmp_path / "ours", resumed)
