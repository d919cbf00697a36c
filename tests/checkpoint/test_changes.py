"""Flags that a resume changes in the middle of a training: the new value holds, in optimizer and schedule."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.flags import MUTABLE
from harness.train import main
from tests.support.parity import TRAINING, as_flags, assert_equal_weights, history, reset

TASK = {"task": "tests.support.tasks.parity_task:build", "report_to": "none"}
SAVING = {
    **TRAINING,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "warmup_steps": 2,
    "optim": "adamw_torch",
}
CHANGED = {"learning_rate": 7e-4, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_epsilon": 1e-6, "max_grad_norm": 0.5}


def train(folder: Path, **changed: Any) -> int:
    reset()
    return main([*as_flags({**SAVING, **TASK, "output_dir": folder, **changed}), "--use_cpu"])


def changed_from(checkpoint: Path, folder: Path, **more: Any) -> int:
    given = {"resume_from_checkpoint": checkpoint, "change_on_resume": list(CHANGED), **CHANGED, **more}
    return train(folder, **given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(folder) == 0
    return folder


def rates(folder: Path, *, start: int = 0) -> list[float]:
    return [row["learning_rate"] for row in history(folder) if "learning_rate" in row and row["step"] > start]


def test_what_is_named_holds_from_the_checkpoint_on(trained: Path, tmp_path: Path) -> None:
    out, again, whole = tmp_path / "out", tmp_path / "again", tmp_path / "whole"
    assert changed_from(trained / "checkpoint-4", out) == 0
    assert train(whole, **CHANGED) == 0
    assert rates(out)[:4] == rates(trained)[:4]
    assert rates(out, start=4) == rates(whole, start=4)
    state = torch.load(out / "checkpoint-8" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["weight_decay"] for group in state] == [0.1, 0.0]  # biases and norms have none, as ever
    assert {(*group["betas"], group["eps"], group["initial_lr"]) for group in state} == {(0.8, 0.999, 1e-6, 7e-4)}
    schedule = torch.load(out / "checkpoint-8" / "scheduler.pt", weights_only=True)
    assert schedule["base_lrs"] == [7e-4, 7e-4]
    arguments = json.loads((out / "checkpoint-6" / "harness_state.json").read_text(encoding="utf-8"))["arguments"]
    assert {name: arguments[name] for name in CHANGED} == CHANGED
    # From a later checkpoint of its own it goes on to the same bits, with the name given again and without.
    assert changed_from(out / "checkpoint-6", again) == 0
    assert_equal_weights(out, again)
    shutil.rmtree(again)
    assert train(again, resume_from_checkpoint=out / "checkpoint-6", **CHANGED) == 0
    assert_equal_weights(out, again)
    with pytest.raises(AssertionError):
        assert_equal_weights(out, trained)


def test_without_its_name_a_rate_stays_that_of_the_states_as_in_the_trainer(trained: Path, tmp_path: Path) -> None:
    given = {"resume_from_checkpoint": trained / "checkpoint-4", "allow_changed_arguments": True, "learning_rate": 7e-4}
    assert train(tmp_path / "out", **given) == 0
    assert rates(tmp_path / "out") == rates(trained)


def test_what_is_not_named_is_refused_as_ever(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert changed_from(trained / "checkpoint-4", tmp_path / "out", seed=7, allow_changed_data_order=True) == 2
    shown = capsys.readouterr().err
    assert "(seed 42 -> 7)" in shown
    assert "learning_rate" not in shown


def test_what_can_not_change_is_refused_with_what_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"resume_from_checkpoint": "auto", "change_on_resume": ["seed"]}
    assert train(tmp_path / "out", **more) == 2
    shown = capsys.readouterr().err
    assert f"--change_on_resume seed: no such flag can change in a training; use {', '.join(MUTABLE)}." in shown
    assert train(tmp_path / "out", change_on_resume=["learning_rate"]) == 2
    assert "--change_on_resume learning_rate does nothing without --resume_from_checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_rate_that_goes_by_evaluations_can_not_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    assert train(tmp_path / "run", **plateau, stop_at_step=2) == 0
    changed = {"learning_rate": 1e-4, "change_on_resume": ["learning_rate"], "resume_from_checkpoint": "true"}
    assert train(tmp_path / "run", **plateau, **changed) == 2
    assert "do not follow from the step; use another --lr_scheduler_type" in capsys.readouterr().err
