"""What a checkpoint holds of a run: each part loads what it saves, and no two save under one name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.build import assemble, build_run, plan_run
from harness.checkpoint.writer import Content
from harness.distributed.accelerator import build_accelerator, choose_backend
from harness.flags import parse
from harness.loop import steps_left, train_step
from harness.model.weights import load_weights
from harness.session import Run
from harness.snapshot import parts, restore, save, take
from harness.tracking.lifecycle import wandb_tracker
from harness.training.state import TrainState
from tests.faults.compare import plain
from tests.support.parity import TASK, TRAINING, as_flags, reset


def begun(folder: Path, weights: Path | None = None) -> tuple[Run, TrainState]:
    reset()
    arguments = {**TRAINING, "save_strategy": "steps", "max_steps": 9}
    flags = as_flags({"task": TASK, "report_to": "none", "output_dir": folder, **arguments})
    config = parse([*flags, "--use_cpu"])
    accelerator = build_accelerator(config.topology, activation_checkpointing=False)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    session, state = assemble(config, choose_backend(accelerator), folder, is_resumed=weights is not None), TrainState()
    if weights is not None:
        load_weights(session.task.model, weights)
    return build_run(session, plan_run(session), state, wandb_tracker([])), state


def trained(folder: Path, steps: int) -> tuple[Run, TrainState]:
    run, state = begun(folder)
    for window in steps_left(run, state, epoch=0):
        train_step(run, state, window)
        state.global_step += 1
        if state.global_step == steps:
            break
    return run, state


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Content]:
    """A checkpoint of the third step, and what was taken for it."""
    run, state = trained(tmp_path, steps=3)
    save(run, state)
    content = take(run, state)
    run.checkpoints.check_last()
    return tmp_path / "checkpoint-3", content


def comparable(content: Content) -> Any:
    window = content.rank_state["harness"]["window"]
    return plain([content.weights, content.files, content.trainer_state, content.shared, window])


def test_what_is_taken_after_a_resume_is_what_was_saved(saved: tuple[Path, Content], tmp_path: Path) -> None:
    path, content = saved
    run, state = begun(tmp_path, weights=path)
    assert comparable(take(run, state)) != comparable(content)
    restore(run, state, path)
    assert state.global_step == 3
    assert comparable(take(run, state)) == comparable(content)


def test_no_two_parts_save_under_one_name(tmp_path: Path) -> None:
    run, state = trained(tmp_path, steps=1)
    names: Counter[str] = Counter()
    for part in parts(run, state):
        content = Content(step=1, weights={}, write_model=print)
        part.save(content)
        names.update([*content.files, *content.shared, *content.others, *content.rank_files])
    assert set(names.values()) == {1}
    assert {"state", "optim", "zero_stage", "data", "software", "arguments", "tracking"} <= set(names)
    assert {"optimizer.pt", "scheduler.pt", "scaler.pt"} <= set(names)
