"""Another run's checkpoint taken over in a run's own folder: its bits, with the rows of the run that takes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint.adopt import adopt, pin
from harness.checkpoint.layout import why_invalid
from harness.errors import CheckpointError
from harness.train import main
from tests.support.parity import TRAINING, as_flags, assert_equal_weights, reset

TASK = {"task": "tests.support.tasks.parity_task:build", "report_to": "none"}
SAVING = {**TRAINING, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
LOW, HIGH, NEW = 1e-3, 4e-3, 3e-3


def train(folder: Path, **changed: Any) -> None:
    reset()
    assert main([*as_flags({**SAVING, **TASK, "output_dir": folder, **changed}), "--use_cpu"]) == 0


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Two runs of other learning rates, stopped at step 4, with their checkpoints pinned beside them.

    The winner has half as many rows.
    """
    folder = tmp_path_factory.mktemp("members")
    for name, rate, logging_steps in (("winner", HIGH, 2), ("loser", LOW, 1)):
        train(folder / name, learning_rate=rate, stop_at_step=4, logging_steps=logging_steps)
        pin(folder / name / "checkpoint-4", folder / f"{name}-4")
    return folder


@pytest.fixture
def taken(members: Path, tmp_path: Path) -> Path:
    """The loser's folder after the takeover, ready to go on with another rate."""
    out = shutil.copytree(members / "loser", tmp_path / "loser")
    note = {"generation": 1, "parent": 0}
    adopt(members / "winner-4", members / "loser-4", out, arguments={"learning_rate": NEW}, note=note)
    return out


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["_row"] for row in found] == list(range(len(found)))
    return [row for row in found if "train/loss" in row]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["train/global_step"], row["train/loss"], row["train/learning_rate"]) for row in rows(folder)]


def test_a_taken_checkpoint_goes_on_to_the_bits_of_its_replay_and_with_the_rows_of_the_taker(
    members: Path, taken: Path, tmp_path: Path
) -> None:
    changed = {"learning_rate": NEW, "change_on_resume": ["learning_rate"], "resume_from_checkpoint": "auto"}
    assert why_invalid(taken / "checkpoint-4") is None
    train(taken, **changed, save_steps=6, stop_at_step=6)
    shutil.rmtree(taken / "checkpoint-6")  # as a kill between two saves leaves it: rows beyond the checkpoint
    adopt(members / "winner-4", members / "loser-4", taken, arguments={"learning_rate": NEW}, note={})
    train(taken, **changed)
    replay = shutil.copytree(members / "winner", tmp_path / "replay")
    train(replay, **changed)
    assert_equal_weights(replay, taken)
    of_loser, of_replay = losses(members / "loser"), losses(replay)
    assert losses(taken) == [*of_loser, *of_replay[2:]]
    assert [step for step, _, _ in of_replay] == [2, 4, 5, 6, 7, 8]
    assert not set(of_loser) & set(of_replay)
    assert [step for step, _, _ in losses(taken)] == list(range(1, 9))


def test_a_takeover_says_where_it_is_from_and_can_be_repeated(members: Path, taken: Path) -> None:
    manifest = json.loads((taken / "checkpoint-4" / "harness_state.json").read_text(encoding="utf-8"))
    assert manifest["adopted"] == {"generation": 1, "parent": 0}
    assert manifest["arguments"]["learning_rate"] == NEW
    assert (taken / "checkpoint-4" / "metrics.jsonl").read_bytes() == (members / "loser" / "metrics.jsonl").read_bytes()
    linked = taken / "checkpoint-4" / "model.safetensors"
    assert linked.samefile(members / "winner-4" / "model.safetensors")
    shutil.rmtree(taken / "checkpoint-4")  # as a kill between its two renames
    adopt(members / "winner-4", members / "loser-4", taken, arguments={}, note={})
    assert why_invalid(taken / "checkpoint-4") is None
    assert not list(taken.glob("*.partial"))


def test_checkpoints_of_two_steps_are_not_exchanged(members: Path, tmp_path: Path) -> None:
    other = shutil.copytree(members / "loser-4", tmp_path / "other")
    manifest = other / "harness_state.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"step": 4', '"step": 5'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"are of the steps 4 and 5, which must be equal"):
        adopt(members / "winner-4", other, tmp_path / "out", arguments={}, note={})
    assert not (tmp_path / "out").exists()


def test_a_pinned_checkpoint_outlives_its_run(members: Path, tmp_path: Path) -> None:
    out = shutil.copytree(members / "winner", tmp_path / "winner")
    pin(out / "checkpoint-4", tmp_path / "kept")
    pin(out / "checkpoint-4", tmp_path / "kept")  # a second worker does so too
    shutil.rmtree(out)
    assert why_invalid(tmp_path / "kept") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
