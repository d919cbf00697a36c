"""What a training is too short for is said at its start, in a line each; nothing is said where all will be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.flags import parse
from harness.tracking.unseen import unseen
from harness.train import main
from harness.training.plan import resolve_plan
from tests.support.parity import TASK, TRAINING, as_flags, reset

STEPS_OF_EPOCH = 20


def lines(*, from_step: int = 0, **flags: Any) -> list[str]:
    config = parse(as_flags({"task": TASK, "max_steps": 40, "logging_steps": 10, **flags}))
    plan = resolve_plan(config.plan, num_batches=STEPS_OF_EPOCH, num_samples=160, accumulation=1, samples_per_step=8)
    return unseen(config.tracking, plan, from_step=from_step)


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
def test_nothing_is_said_where_all_will_be_seen(flags: dict[str, Any]) -> None:
    assert lines(**flags) == []


def test_it_is_said_when_the_training_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reset()
    flags = {**TRAINING, "task": TASK, "max_steps": 2, "wandb_watch": "all", "wandb_mode": "disabled"}
    assert main([*as_flags({**flags, "output_dir": tmp_path / "out"}), "--use_cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("shows nothing in this run") == 1
    assert "--wandb_watch all shows nothing in this run: histograms are due every 100 steps" in out
