"""A process that the system kills takes the training with it in one line, and the checkpoints are whole."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.errors import meaning_of
from tests.support.faulty_training import Training
from tests.support.launching import DDP, SCRIPT, launcher
from tests.support.parity import history

IN_TWO = {"per_device_train_batch_size": 4, "report_to": "none"}


def ranks_of(training: Training) -> dict[str, psutil.Process]:
    """The processes of a launch, by their rank."""
    found = {}
    for process in psutil.Process(training.process.pid).children(recursive=True):
        if process.name() != "pt_data_worker" and (rank := process.environ().get("RANK")):
            found.setdefault(rank, process)
    return found


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [each for each in process.children() if each.name() == "pt_data_worker"]


def launched(folder: Path, **arguments: object) -> Training:
    command = (*launcher(DDP, "--num_processes=2"), SCRIPT)
    return Training(folder, None, pace=0.2, command=command, **IN_TWO, **arguments)


def goes_on(training: Training, **arguments: object) -> None:
    """It goes on to its end: 30 steps and the row of the end."""
    shutil.copytree(training.output_dir, training.folder / "again" / "out")
    flags = {**arguments, "report_to": "none", "resume_from_checkpoint": "auto", "allow_changed_arguments": True}
    Training(training.folder / "again", None, **flags).ended()
    assert len(history(training.folder / "again" / "out")) == 31


@pytest.mark.parametrize("way", ["SIGKILL", "SIGBUS", "exit"])
def test_a_worker_s_death_is_one_line(way: str, tmp_path: Path) -> None:
    """One process, two workers; what torch says of the death is its own."""
    task = {"exits_at": 60} if way == "exit" else {}
    training = Training(tmp_path, None, pace=0.1, dataloader_num_workers=2, report_to="none", task=task)
    if way != "exit":
        training.reach(14)
        worker = workers_of(psutil.Process(training.process.pid))[0]
        os.kill(worker.pid, getattr(signal, way))
    training.ended(1)
    (line,) = [line for line in training.err.splitlines() if "harness train: " in line]
    remedy = "--dataloader_num_workers 0" if way == "exit" else "--shm-size" if way == "SIGBUS" else "memory ran out"
    assert remedy in line
    assert "--resume_from_checkpoint auto" in line
    assert "harness/errors.py" not in training.err, "a traceback of ours"
    if way == "SIGKILL":
        goes_on(training, dataloader_num_workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 1", "data worker of rank 1"])
def test_a_rank_s_death_is_one_line_on_the_others(victim: str, tmp_path: Path) -> None:
    training = launched(tmp_path, dataloader_num_workers=1 if "worker" in victim else 0)
    training.reach(14)
    rank = ranks_of(training)[victim[-1]]
    (workers_of(rank)[0] if "worker" in victim else rank).kill()
    training.ended(1)
    lines = [line for line in training.err.splitlines() if "harness train: " in line]
    # A rank that the launcher ends first says nothing, and the launcher tells of the one that was killed.
    assert lines or "(SIGKILL)" in training.err, training.err
    assert all("Another rank has ended" in line or "Data worker" in line for line in lines)
    assert "harness/errors.py" not in training.err, training.err
    assert (training.output_dir / "checkpoint-10").is_dir()


def test_a_worker_that_hangs_is_looked_for_among_the_subprocesses(tmp_path: Path) -> None:
    training = Training(
        tmp_path, None, pace=0.1, dataloader_num_workers=1, report_to="none", slow_step_seconds=2, max_steps=20
    )
    training.reach(14)
    (worker,) = workers_of(psutil.Process(training.process.pid))
    worker.suspend()
    end = time.monotonic() + 60
    while "py-spy dump --subprocesses --pid" not in training.err:
        assert time.monotonic() < end, training.err
        time.sleep(0.1)
    worker.resume()
    training.ended()
    assert "goes on after" in training.err


def test_other_errors_keep_their_traceback() -> None:
    assert meaning_of(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")) is None
    assert meaning_of(RuntimeError()) is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a shell's ulimit -n, and /proc")
def test_256_open_files_are_enough(tmp_path: Path) -> None:
    limited = ("bash", "-c", 'ulimit -n 256; exec "$@"', "x", sys.executable, SCRIPT)
    flags = {"dataloader_num_workers": 2, "eval_strategy": "steps", "eval_steps": 10, "wandb_watch": "all"}
    Training(tmp_path, None, command=limited, **flags).ended()
