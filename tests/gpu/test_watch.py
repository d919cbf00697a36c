"""--wandb_watch on the device: histograms are wandb.watch's, and the training is the same with them."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.tracking.media.histograms import Histogram, Watch
from tests.gpu.conftest import NeedsCard
from tests.support.launching import run
from tests.support.parity import TRAINING, assert_equal_runs, run_harness
from tests.support.wandb.artifact_processes import environment
from tests.support.wandb.watch_pair import LOG_FREQ, NUM_STEPS, Rows, rows_of_wandb

# The first histograms are those of step 100.
ARGUMENTS: dict[str, Any] = {**TRAINING, "max_steps": 101, "logging_steps": 10, "full_determinism": True}
WATCHED: dict[str, Any] = {"report_to": "wandb", "wandb_mode": "offline", "wandb_watch": "all"}


def observed(model: nn.Module) -> dict[str, Histogram]:
    return Watch(model, log="all", log_freq=1, is_main=True).observe()


def model_with_gradients() -> nn.Module:
    """Tensors of several chunks, and a gradient nearly all of which is zero."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(40_000, 128), nn.Linear(128, 3000), nn.ReLU(), nn.Linear(3000, 3))
    model(torch.arange(12)).square().sum().backward()
    return model


def test_histograms_are_those_of_wandb_watch_to_the_bit(device: str, processes: None, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.wandb.watch_pair", str(tmp_path), device]
    ended = run(command, cwd=tmp_path, **environment(tmp_path, WANDB_SILENT="true", WANDB_MODE="offline"))
    assert ended.code == 0, ended.err[-3000:]
    theirs = rows_of_wandb(tmp_path)
    ours: Rows = json.loads((tmp_path / "ours.json").read_text(encoding="utf-8"))
    assert [bool(row) for row in theirs] == [step % LOG_FREQ == 0 for step in range(1, NUM_STEPS + 1)]
    assert [set(row) for row in ours] == [set(row) for row in theirs]
    different = {
        f"step {step}, {name}": (mine[name], its[name])
        for step, (mine, its) in enumerate(zip(ours, theirs, strict=True), start=1)
        for name in its
        if mine[name] != its[name]
    }
    assert not different, (
        f"{len(different)} of {sum(map(len, theirs))}: {list(different)}; {next(iter(different.values()))}"
    )


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["as usual", "deterministic"])
def test_the_device_draws_what_the_host_draws(is_deterministic: bool, device: str, deterministic: None) -> None:
    model = model_with_gradients()
    there = copy.deepcopy(model).to(device)
    for mine, its in zip(model.parameters(), there.parameters(), strict=True):
        assert mine.grad is not None
        its.grad = mine.grad.to(device)
    expected = observed(model)
    torch.use_deterministic_algorithms(is_deterministic)
    assert observed(there) == expected


def test_a_training_that_is_watched_has_the_same_bits(device: str, deterministic: None, tmp_path: Path) -> None:
    for name, more in {"plain": {}, "watched": WATCHED}.items():
        run_harness(tmp_path / name, {**ARGUMENTS, **more}, device=device)
    assert_equal_runs(tmp_path / "plain", tmp_path / "watched")
    assert len(gradients_of_row(tmp_path / "watched")) > 20


def gradients_of_row(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (row,) = [row for row in rows if any(name.startswith("gradients/") for name in row)]
    return {name: value for name, value in row.items() if name.startswith("gradients/")}


def test_gradients_are_shown_without_the_scale_of_fp16(
    device: str, deterministic: None, tmp_path: Path, needs_card: NeedsCard
) -> None:
    once = {**ARGUMENTS, **WATCHED, "learning_rate": 0.0, "task_args": {"dropout": 0.0}}  # both have the same weights
    run_harness(tmp_path / "fp32", once, device=device)
    expected = gradients_of_row(tmp_path / "fp32")
    needs_card("fp16's scaler")
    run_harness(tmp_path / "fp16", {**once, "fp16": True}, device=device)
    found = gradients_of_row(tmp_path / "fp16")
    assert list(found) == list(expected)
    for name, histogram in expected.items():
        spread = histogram["bins"][-1] - histogram["bins"][0]
        assert found[name]["bins"] == pytest.approx(histogram["bins"], abs=0.05 * spread), name
