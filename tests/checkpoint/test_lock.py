"""One writer a folder: a second one is refused, a dead one is no obstacle, a shut-out one puts nothing in place."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.checkpoint.lock import LOCK_FILE, SILENCE_SECONDS, Holder, Lock
from harness.errors import ConfigError
from tests.support.faulty_training import Training

HOLDER = """
import sys, time
from pathlib import Path
from harness.checkpoint.lock import Lock
with Lock() as lock:
    lock.take(Path(sys.argv[1]))
    print("taken", flush=True)
    sys.stdin.readline()
    print(lock.is_lost(), flush=True)
"""


@contextmanager
def holder(folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env={**os.environ, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdin
    try:
        assert process.stdout.readline() == "taken\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def asked(process: subprocess.Popen[str]) -> str:
    """Let it go on to its end: what it says of having lost the lock."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    said = process.stdout.readline().strip()
    process.wait()
    return said


def test_a_second_writer_is_refused_and_the_first_one_gives_the_lock_back(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        message = rf"--output_dir={re.escape(str(tmp_path))} is in use by process {first.pid} on .* since .*delete"
        with Lock() as lock, pytest.raises(ConfigError, match=message):
            lock.take(tmp_path)
        assert asked(first) == "False"
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_writer_that_was_killed_is_no_obstacle(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (tmp_path / LOCK_FILE).is_file()
        with Lock() as lock:
            lock.take(tmp_path)
            assert not lock.is_lost()
    assert list(tmp_path.iterdir()) == []


def test_a_requeued_job_fences_its_earlier_attempt_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1") as earlier:
        for job, count in (("8", "2"), ("7", "1"), ("7", "0")):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", count)
            with Lock() as lock, pytest.raises(ConfigError, match="in use"):
                lock.take(tmp_path)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        with Lock() as lock:
            lock.take(tmp_path)
            assert asked(earlier) == "True"
            assert not lock.is_lost(), "the one that was shut out gave nothing back"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")


def test_an_attempt_stays_fenced_after_the_later_one_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0") as earlier:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with Lock() as lock:
            lock.take(tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert asked(earlier) == "True"


def test_a_writer_on_another_machine_is_dead_when_it_is_silent(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
    values = json.loads((tmp_path / LOCK_FILE).read_text()) | {"host": "elsewhere"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(values))
    with Lock() as lock, pytest.raises(ConfigError, match="on elsewhere since"):
        lock.take(tmp_path)
    long_ago = time.time() - SILENCE_SECONDS - 1
    os.utime(tmp_path / LOCK_FILE, (long_ago, long_ago))
    with Lock() as lock:
        lock.take(tmp_path)
        assert not lock.is_lost()


def test_a_lock_that_can_not_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("{")
    with Lock() as lock:
        lock.take(tmp_path)
        assert json.loads((tmp_path / LOCK_FILE).read_text()).keys() == {
            field.name for field in dataclasses.fields(Holder)
        }


@pytest.mark.slow
def test_two_trainings_never_share_a_folder(tmp_path: Path) -> None:
    arguments = {"report_to": "none", "wandb_run_id": None, "wandb_log_model": None, "resume_from_checkpoint": "auto"}
    first = Training(tmp_path / "run", None, pace=1.2, **arguments)
    first.reach(3)
    before = sorted(path.name for path in first.output_dir.iterdir())
    second = subprocess.run(first.process.args, env=first.variables, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"is in use by process {first.process.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    assert set(before) <= {path.name for path in first.output_dir.iterdir()}
    os.killpg(first.process.pid, signal.SIGSTOP)  # it hangs where its node is thought to be dead
    values = json.loads((first.output_dir / LOCK_FILE).read_text())
    (first.output_dir / LOCK_FILE).write_text(json.dumps({**values, "token": "other"}))
    os.killpg(first.process.pid, signal.SIGCONT)
    first.ended(1)
    assert "Another process has taken over" in first.err
    assert not list(first.output_dir.glob("*.partial"))
    assert (first.output_dir / LOCK_FILE).is_file()
