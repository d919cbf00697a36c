"""What W&B will show and when is said at the start, in a line each, and for what a training is too short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.flags import parse
from harness.tracking.media.due import Evaluated
from harness.tracking.outlook import outlook
from harness.train import main
from harness.training.plan import resolve_plan
from tests.support.parity import TASK, TRAINING, as_flags, reset

STEPS_OF_EPOCH = 20


def lines(*, from_step: int = 0, is_offline: bool = False, **flags: Any) -> list[str]:
    config = parse(as_flags({"task": TASK, "max_steps": 40, "logging_steps": 10, **flags}))
    plan = resolve_plan(config.plan, num_batches=STEPS_OF_EPOCH, num_samples=160, accumulation=1, samples_per_step=8)
    return outlook(config.tracking, plan, from_step=from_step, is_offline=is_offline)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"logging_steps": 500}, "--logging_steps 500 shows nothing in this run: the loss is reported every 500 steps"),
        ({"wandb_watch": "all"}, "--wandb_watch all shows nothing in this run: histograms are due every 100 steps"),
        (
            {"from_step": 35},
            "--logging_steps 20 shows nothing in this run: the loss is reported every 20 steps, steps 36",
        ),
        (
            {"eval_strategy": "epoch", "wandb_eval_samples": 5, "wandb_eval_samples_freq": 3},
            "--wandb_eval_samples 5 shows nothing in this run: tables are due every 3 epochs",
        ),
        (
            {"eval_strategy": "epoch", "eval_delay": 3},
            "--eval_delay 3 shows nothing in this run: evaluations begin at epoch",
        ),
        (
            {"eval_strategy": "steps", "eval_delay": 41},
            "--eval_delay 41 shows nothing in this run: evaluations begin at step",
        ),
    ],
)
def test_a_setting_that_shows_nothing_is_named(flags: dict[str, Any], said: str) -> None:
    if "from_step" in flags:
        flags = {**flags, "max_steps": 39, "logging_steps": 20}
    (line,) = lines(**flags)
    assert line.startswith(said)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"logging_steps": 40},
        {"logging_steps": 500, "logging_strategy": "no"},
        {"logging_steps": 500, "logging_first_step": True},
        {"wandb_watch": "all", "max_steps": 100},
        {"wandb_watch": "all", "wandb_disabled": True},
        {"eval_strategy": "epoch", "wandb_eval_samples": 5},
        {"eval_strategy": "steps", "eval_steps": 500, "save_steps": 500, "eval_delay": 40},
        {"from_step": 40},
    ],
)
def test_nothing_is_missed_where_all_will_be_seen(flags: dict[str, Any]) -> None:
    assert not [line for line in lines(**flags) if "shows nothing" in line]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"wandb_watch": "all", "max_steps": 250},
            "histograms of gradients and parameters every 100 steps: 2 times, the first after step 100.",
        ),
        (
            {"wandb_watch": "gradients", "max_steps": 250, "from_step": 100},
            "histograms of gradients every 100 steps: once, the first after step 200.",
        ),
        (
            {"eval_strategy": "epoch", "wandb_eval_samples": 5, "max_steps": 90},
            "a table of 5 predictions with an evaluation every 2 epochs: 2 times, the first after step 40 (epoch 2).",
        ),
        (
            {"eval_strategy": "steps", "eval_steps": 8, "wandb_eval_samples": 5, "wandb_eval_samples_steps": 10},
            "a table of 5 predictions with an evaluation every 10 steps: 4 times, the first after step 16 (epoch 0.8).",
        ),
        (
            {
                "eval_strategy": "steps",
                "eval_steps": 15,
                "eval_delay": 20,
                "wandb_eval_samples": 5,
                "wandb_eval_samples_steps": 15,
                "wandb_eval_samples_freq": 1,
                "max_steps": 50,
            },
            "a table of 5 predictions with an evaluation every epoch and every 15 steps: 2 times, the first after "
            "step 30 (epoch 1.5).",
        ),
        (
            {"wandb_log_model": "end", "wandb_registry": "My Model"},
            "the final model in the registry as wandb-registry-model/My Model when the training has ended.",
        ),
        (
            {"wandb_log_model": "end", "wandb_registry": "a/b", "is_offline": True},
            "the final model in the registry as a/b when `harness sync` has uploaded it: the run is offline.",
        ),
    ],
)
def test_what_wandb_will_show_is_said_with_how_often_and_from_when(flags: dict[str, Any], said: str) -> None:
    assert lines(**flags) == [f"W&B will show {said}"]


def test_a_resumed_training_goes_on_from_its_last_evaluation() -> None:
    config = parse(
        as_flags(
            {
                "task": TASK,
                "max_steps": 40,
                "eval_strategy": "steps",
                "eval_steps": 14,
                "wandb_eval_samples": 5,
                "wandb_eval_samples_steps": 15,
                "logging_steps": 10,
            }
        )
    )
    plan = resolve_plan(config.plan, num_batches=STEPS_OF_EPOCH, num_samples=160, accumulation=1, samples_per_step=8)
    # Step 28 is the first evaluation from step 15 on, step 40 the first from step 30 on.
    for step, evaluated, times in ((0, None, "2 times"), (16, 14, "2 times"), (28, 28, "once")):
        before = None if evaluated is None else Evaluated(epoch=evaluated / STEPS_OF_EPOCH, step=evaluated)
        (line,) = outlook(config.tracking, plan, from_step=step, evaluated=before, is_offline=False)
        assert times in line


def test_it_is_said_when_the_training_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reset()
    flags = {**TRAINING, "task": TASK, "max_steps": 2, "wandb_watch": "all", "wandb_mode": "disabled"}
    assert main([*as_flags({**flags, "output_dir": tmp_path / "out"}), "--use_cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("shows nothing in this run") == 1
    assert "--wandb_watch all shows nothing in this run: histograms are due every 100 steps" in out
