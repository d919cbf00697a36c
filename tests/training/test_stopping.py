"""A stop from outside: at a step boundary, the same on all ranks, with a checkpoint; then the run is the same run."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from harness.train import main
from tests.support.launching import DDP, SCRIPT, launcher, run
from tests.support.parity import TRAINING, as_flags, assert_equal_runs, history
from tests.support.wandb.file import read_all

STOPPING = "tests.support.tasks.stopping_task:build"
ARGUMENTS = {**TRAINING, "save_strategy": "steps", "save_steps": 4}


def flags(folder: Path, task: str, **more: object) -> list[str]:
    return as_flags({"task": task, "report_to": "none", "output_dir": folder, **ARGUMENTS, **more})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(flags(folder, "tests.support.tasks.parity_task:build")) == 0
    return folder


def test_a_process_whose_folder_is_taken_over_ends_at_once_and_leaves_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    task = {"task_args": {"folder": str(folder), "at": 6}, "save_steps": 100}
    assert main(flags(folder, "tests.support.tasks.taking_over_task:build", **task)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == f"harness train: Another process has taken over {folder}: this one ends at step 5 of 30."
    assert not list(folder.glob("checkpoint-*"))
    assert not (folder / "model.safetensors").exists()
    assert '"token": "another"' in (folder / "harness.lock").read_text(encoding="utf-8")


@pytest.mark.slow
def test_sigterm_saves_says_so_and_the_run_goes_on_as_if_nothing_had_been(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    task = {"task_args": {"after": 50, "sent": str(tmp_path / "sent")}}
    command = [sys.executable, SCRIPT, *flags(folder, STOPPING, **task)]
    wandb = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}
    ended = run([c for c in command if c != "--report_to=none"], **wandb)
    assert ended.code == 85, ended.err[-2000:]
    assert (folder / "preempted").is_file()
    # Sample 50 belongs to the seventh batch, which is drawn ahead: the stop is at the boundary before.
    (message,) = [line for line in ended.err.splitlines() if line.startswith("harness train: ")]
    assert message.startswith("harness train: Preempted at step 6 of 30: saved; go on with: ")
    assert message.endswith(f" --resume_from_checkpoint true --output_dir {folder}")
    assert (folder / "checkpoint-6" / "harness_state.json").is_file()
    assert not (folder / "model.safetensors").exists()
    (saved,) = read_all(tmp_path)
    assert (saved.exit_code, saved.is_preempting) == (85, True)

    ended = run([*[c for c in command if c != "--report_to=none"], "--resume_from_checkpoint=true"], **wandb)
    assert ended.code == 0, ended.err[-2000:]
    assert not (folder / "preempted").exists()
    assert_equal_runs(uninterrupted, folder)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    task = {"task_args": {"after": 20, "rank": 1, "sent": str(tmp_path / "sent")}}
    more = {"per_device_train_batch_size": 4, "num_train_epochs": 1}
    command = [*launcher(DDP), SCRIPT, *flags(folder, STOPPING, **task, **more)]
    ended = run(command)
    assert ended.code != 0
    assert ended.err.count("harness train: Preempted at step ") == 1
    (checkpoint,) = [path for path in folder.glob("checkpoint-*") if path.name != "checkpoint-4"]
    state = json.loads((checkpoint / "harness_state.json").read_text())
    assert state["world_size"] == 2
    # Sample 20 of rank 1 is drawn in step 4; one more step runs while the ranks agree.
    assert state["step"] == 5
    assert (folder / "preempted").is_file()

    ended = run([*command, "--resume_from_checkpoint=true"])
    assert ended.code == 0, ended.err[-2000:]
    whole = tmp_path / "whole"
    again = flags(whole, "tests.support.tasks.parity_task:build", **more)
    assert run([*launcher(DDP), SCRIPT, *again]).code == 0
    assert_equal_runs(whole, folder)


CLOSED = """
import sys
import torch
from harness.train import main

code = main(sys.argv[1:])
print(f"ended with {code}, in a process group: {torch.distributed.is_initialized()}", flush=True)
"""


@pytest.mark.slow
def test_a_stop_closes_the_process_group_on_all_ranks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CLOSED, encoding="utf-8")
    task = {"task_args": {"after": 20, "rank": 1, "sent": str(tmp_path / "sent")}}
    ended = run([*launcher(DDP), str(script), *flags(tmp_path / "run", STOPPING, **task)])
    assert ended.code == 0, ended.err[-3000:]
    assert ended.out.count("ended with 85, in a process group: False") == 2


def test_a_signal_without_checkpoints_says_that_nothing_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)
    task = {"task_args": {"after": 30, "sent": str(tmp_path / "sent")}}
    assert main(flags(tmp_path / "run", STOPPING, **task, save_strategy="no")) == 1
    assert "nothing is saved with --save_strategy no" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_without_a_signal_is_not_changed_by_listening(uninterrupted: Path) -> None:
    assert history(uninterrupted)[-1]["step"] == 30


def test_a_stop_at_a_step_saves_there_and_the_run_goes_on_as_if_nothing_had_been(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, parity = tmp_path / "run", "tests.support.tasks.parity_task:build"
    assert main(flags(folder, parity, stop_at_step=15)) == 0  # the last step of an epoch
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("harness train: Stopped at step 15 of 30, as --stop_at_step says: saved; go on with: ")
    assert message.endswith(f" --resume_from_checkpoint true --output_dir {folder} --stop_at_step 30")
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (4, 8, 12, 15)}
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "preempted").exists()
    rows = (folder / "metrics.jsonl").read_bytes()
    assert main(flags(folder, parity, stop_at_step=15, resume_from_checkpoint="auto")) == 0  # it is there already
    assert (folder / "metrics.jsonl").read_bytes() == rows
    assert "Stopped at step 15 of 30" in capsys.readouterr().err
    assert main(flags(folder, parity, stop_at_step=30, resume_from_checkpoint="true")) == 0
    assert "Stopped" not in capsys.readouterr().err
    assert "stop_at_step" not in (folder / "harness_config.yaml").read_text(encoding="utf-8")
    assert_equal_runs(uninterrupted, folder)


def test_a_stop_at_a_step_is_refused_where_nothing_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parity = "tests.support.tasks.parity_task:build"
    assert main(flags(tmp_path / "run", parity, stop_at_step=4, save_strategy="no")) == 2
    assert "--stop_at_step saves, and --save_strategy=no saves nothing" in capsys.readouterr().err
    assert main(flags(tmp_path / "run", parity, stop_at_step=0)) == 2
    assert "--stop_at_step=0: use 1 or more" in capsys.readouterr().err
