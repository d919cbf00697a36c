"""What could not be saved is refused before the first step, and what fails later leaves the weights."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.model.weights import load_weights, save_model, stand_ins
from harness.train import main
from tests.support.launching import DDP, FSDP2, SCRIPT, launcher, needs_fsdp, run
from tests.support.parity import TRAINING, as_flags, reset
from tests.support.tasks import parity_task, unsaved_tasks

TASKS = "tests.support.tasks.unsaved_tasks"
SAVING = {**TRAINING, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 5}


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The last place for weights: the system's folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def train(out: Path, builder: str, **changes: Any) -> int:
    reset()
    flags = {**SAVING, "task": f"{TASKS}:{builder}", "output_dir": out, "report_to": "none", **changes}
    return main([*as_flags(flags), "--use_cpu"])


# What is wrong, and what the message has of it.
WRONG = {
    "unserializable_config": "The model GPT2LMHeadModel can't be saved, so no step is made: TypeError",
    "generation_config": "The model GPT2LMHeadModel can't be saved, so no step is made: ValueError",
    "tied_by_hand": "shared tensors",
    "sparse_weight": "The model GPT2LMHeadModel can't be saved, so no step is made: ",
    "odd_state": "extra.odd, a dict, and a checkpoint keeps tensors only",
    "tokenizer": "The Tokenizer can't be saved, so no step is made: RuntimeError this tokenizer can't be written",
}


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
@pytest.mark.parametrize("builder", WRONG)
def test_what_can_not_be_saved_is_refused_before_the_first_step(
    builder: str, save_strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(out, builder, save_strategy=save_strategy) == 2
    shown = capsys.readouterr()
    assert WRONG[builder] in shown.err
    assert shown.err.count("harness train: ") == 1
    assert "Traceback" not in shown.err
    assert "loss" not in shown.out
    assert [path.name for path in out.iterdir()] == ["harness_config.yaml"]


def test_a_resume_is_tried_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert train(out, "fine", max_steps=5) == 0
    assert train(out, "tokenizer", max_steps=10, resume_from_checkpoint="true", allow_changed_arguments=True) == 2
    assert "The Tokenizer can't be saved" in capsys.readouterr().err
    assert sorted(path.name for path in out.glob("checkpoint*")) == ["checkpoint-5"]


def test_trying_leaves_nothing_and_changes_no_number(tmp_path: Path) -> None:
    assert train(tmp_path / "out", "fine", max_steps=5) == 0
    assert not list(tmp_path.rglob("*.partial"))
    model = parity_task.build(unsaved_tasks.config()).model
    assert "dtype" not in vars(model.config) or model.config.dtype is None


@pytest.mark.parametrize("tied", [True, False])
def test_views_of_one_memory_are_all_saved(tied: bool, tmp_path: Path) -> None:
    model = unsaved_tasks.Views(tied=tied)
    save_model(model, None, tmp_path, as_published=False)
    found = load_file(tmp_path / "model.safetensors")
    again = unsaved_tasks.Views(tied=tied)
    load_weights(again, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert ("head.weight" in found) != tied
    tensors, num_bytes = stand_ins(model)
    assert tensors.keys() == model.state_dict().keys()
    assert num_bytes == sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_tokenizer_that_fails_at_the_end_leaves_the_weights(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="this tokenizer can't be written"):
        train(out, "failing_later", save_strategy=strategy, max_steps=10)
    step = 5 if strategy == "steps" else 10
    assert f"The weights of step {step} are in {out}/weights-of-step-{step}.pt" in capsys.readouterr().err
    found = torch.load(out / f"weights-of-step-{step}.pt", weights_only=True)
    model = parity_task.build(unsaved_tasks.config()).model
    model.load_state_dict(found)


def test_the_weights_that_are_left_are_those_of_the_training(tmp_path: Path) -> None:
    assert train(tmp_path / "fine", "fine", save_strategy="no", max_steps=6) == 0
    with pytest.raises(RuntimeError, match="can't be written"):
        train(tmp_path / "out", "failing_later", save_strategy="no", max_steps=6)
    with pytest.raises(RuntimeError, match="odd state"):
        train(tmp_path / "odd", "odd_later", save_strategy="no", max_steps=6)
    evaluating = {"eval_strategy": "steps", "eval_steps": 6}
    with pytest.raises(RuntimeError, match="no evaluation"):
        train(tmp_path / "eval", "failing_evaluation", save_strategy="no", max_steps=6, **evaluating)
    model = load_file(tmp_path / "fine" / "model.safetensors")
    for folder in ("out", "odd", "eval"):
        found = torch.load(tmp_path / folder / "weights-of-step-6.pt", weights_only=True)
        for name, tensor in model.items():
            assert torch.equal(found[name], tensor), name
        assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()


def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root, mount and a machine that lets one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def disk_of_1_mb(tmp_path: Path) -> Iterator[Path]:
    yield from small_disk(tmp_path / "disk", "1100k")


def test_a_disk_that_is_too_small_for_one_checkpoint_is_refused_with_numbers(
    disk_of_1_mb: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = disk_of_1_mb / "out"
    assert train(out, "wide") == 2
    shown = capsys.readouterr().err
    assert "A checkpoint can't be saved, so no step is made: a checkpoint takes at least 1,446,912 bytes" in shown
    assert f"free in {out}: make room, or take another --output_dir." in shown
    assert train(out, "wide", save_strategy="no") == 0  # the model alone has room


def test_a_disk_that_is_too_small_for_all_checkpoints_is_warned_of(
    disk_of_1_mb: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(disk_of_1_mb / "out", "fine", max_steps=3, save_steps=1) == 1
    shown = capsys.readouterr().err
    assert "3 checkpoints of 0.4 MB and the final model take 1.4 MB, and 1.1 MB are free" in shown
    assert "give a smaller --save_total_limit" in shown


def test_a_full_disk_at_the_end_leaves_the_weights_elsewhere(
    disk_of_1_mb: Path, own_temporary_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = {"fill": str(disk_of_1_mb / "ballast")}
    assert train(disk_of_1_mb / "out", "filling", save_strategy="no", max_steps=6, task_args=args) == 1
    left = list(own_temporary_folder.glob("harness-weights-*/weights-of-step-6.pt"))
    assert len(left) == 1
    assert f"The weights of step 6 are in {left[0]}" in capsys.readouterr().err
    parity_task.build(unsaved_tasks.config()).model.load_state_dict(torch.load(left[0], weights_only=True))


@pytest.mark.slow
@pytest.mark.parametrize("config", [DDP, pytest.param(FSDP2, marks=needs_fsdp)], ids=["ddp", "fsdp2"])
def test_two_processes_refuse_together_and_leave_whole_weights(config: Path, tmp_path: Path) -> None:
    def launched(out: Path, builder: str, **changes: Any) -> Any:
        flags = {**SAVING, "task": f"{TASKS}:{builder}", "output_dir": out, "report_to": "none", **changes}
        return run([*launcher(config, "--num_processes=2"), SCRIPT, *as_flags(flags)])

    refused = launched(tmp_path / "refused", "tokenizer")
    assert refused.code != 0
    assert refused.err.count("harness train: The Tokenizer can't be saved, so no step is made") == 1
    failed = launched(tmp_path / "out", "failing_later", save_strategy="no", max_steps=6)
    assert failed.code != 0
    assert "The weights of step 6 are in" in failed.err
    odd = launched(tmp_path / "odd", "odd_later", save_strategy="no", max_steps=6)
    assert odd.code != 0
    fine = launched(tmp_path / "fine", "fine", save_strategy="no", max_steps=6)
    assert fine.code == 0, fine.err
    model = load_file(tmp_path / "fine" / "model.safetensors")
    for folder in ("out", "odd"):
        found = torch.load(tmp_path / folder / "weights-of-step-6.pt", weights_only=True)
        assert all(torch.equal(found[name], tensor) for name, tensor in model.items())
