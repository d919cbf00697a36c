"""One writer a folder: a second one is refused, a dead one is no obstacle, a shut-out one puts nothing in place."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.checkpoint import lock as locks
from harness.checkpoint.lock import LOCK_FILE, Heartbeats, Holder, Lock, is_held
from harness.checkpoint.processes import fingerprint_of, is_running
from harness.errors import ConfigError
from tests.support.faulty_training import Training

HOLDER = """
import platform, sys, time
from pathlib import Path
from harness.checkpoint import lock as locks
from harness.errors import ConfigError
locks.HEARTBEAT_SECONDS = 0.1
platform.node = lambda: "a-name-that-both-have"
with locks.Lock() as lock:
    try:
        lock.take(Path(sys.argv[1]))
    except ConfigError as error:
        sys.exit(str(error))
    print("taken", flush=True)
    sys.stdin.readline()
    print(lock.is_lost(), flush=True)
"""
# A namespace of process numbers, as each container has: with a /proc of its own, as containers have, or without.
CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
CONTAINER_WITHOUT_PROC = CONTAINER[:-1]
needs_containers = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode,
    reason="no namespaces of process numbers here: it takes Linux and root",
)


@contextmanager
def holder(folder: Path, *inside: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*inside, sys.executable, "-c", HOLDER, str(folder)],
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


def change(folder: Path, **values: Any) -> None:
    path = folder / LOCK_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def short_watch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(locks, "WATCH_SECONDS", 1.5)
    caplog.set_level(logging.WARNING)


ELSEWHERE = {"host": "elsewhere", "created_at": "another-boot pid:[1] time:[1] 1"}


@pytest.mark.usefixtures("short_watch")
def test_a_writer_on_another_machine_is_dead_when_it_is_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
    change(tmp_path, **ELSEWHERE)
    now = time.time()
    os.utime(tmp_path / LOCK_FILE, (now + 1000, now + 1000))  # by its clock
    began = time.monotonic()
    with Lock() as lock:
        lock.take(tmp_path)
        assert not lock.is_lost()
    assert time.monotonic() - began >= 1.5
    assert f"process {first.pid} on elsewhere" in caplog.text
    assert "watching its heartbeat for 1.5 s" in caplog.text
    assert "was silent for 1.5 s: its lock is taken over" in caplog.text


def test_a_writer_on_another_machine_is_alive_when_its_heartbeat_changes(tmp_path: Path) -> None:
    with holder(tmp_path):
        change(tmp_path, **ELSEWHERE)
        os.utime(tmp_path / LOCK_FILE, (0, 0))  # its clock stands in 1970
        with Lock() as lock, pytest.raises(ConfigError, match=r"on elsewhere since .* delete"):
            lock.take(tmp_path)


@needs_containers
@pytest.mark.parametrize("kind", [CONTAINER, CONTAINER_WITHOUT_PROC])
def test_two_containers_with_one_host_name_do_not_take_each_others_lock(kind: tuple[str, ...], tmp_path: Path) -> None:
    second = [*kind, sys.executable, "-c", HOLDER, str(tmp_path)]
    with holder(tmp_path, *kind) as first:
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == 1
        done = subprocess.run(second, capture_output=True, text=True, input="", timeout=60, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "is in use by process 1 on a-name-that-both-have" in done.stderr
        with Lock() as lock, pytest.raises(ConfigError, match="is in use by process 1 "):
            lock.take(tmp_path)
        assert is_held(tmp_path, Heartbeats())
        assert asked(first) == "False"
    assert list(tmp_path.iterdir()) == []


@needs_containers
@pytest.mark.usefixtures("short_watch")
def test_the_lock_of_a_container_that_was_killed_is_taken_after_the_watch(tmp_path: Path) -> None:
    with holder(tmp_path, *CONTAINER) as first:
        first.kill()
        first.wait()
        heartbeats = Heartbeats()
        assert is_held(tmp_path, heartbeats)
        with Lock() as lock:
            lock.take(tmp_path)
            assert not lock.is_lost()
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_is_set_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = psutil.boot_time()
    with holder(tmp_path) as first:
        # psutil adds the time of the boot, by the clock of today, to the time since the boot.
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: true + 3, raising=False)
        with Lock() as lock, pytest.raises(ConfigError, match=f"in use by process {first.pid} "):
            lock.take(tmp_path)
        assert asked(first) == "False"


@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_a_lock_of_an_older_version_is_held_while_its_process_runs(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(tmp_path) as first:
        change(tmp_path, created_at=psutil.Process(first.pid).create_time() + seconds, host=platform.node())
        with Lock() as lock, pytest.raises(ConfigError, match=f"in use by process {first.pid} "):
            lock.take(tmp_path)
        first.kill()
        first.wait()
        monkeypatch.setattr(locks, "WATCH_SECONDS", 0.3)
        with Lock() as lock:
            lock.take(tmp_path)


def test_a_lock_of_a_newer_version_is_understood(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        change(tmp_path, field_of_tomorrow=["a"], restart_count=None)
        with Lock() as lock, pytest.raises(ConfigError, match=f"in use by process {first.pid} "):
            lock.take(tmp_path)


def test_a_killed_process_is_known_at_once_and_its_number_may_be_given_out_again(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        fingerprint = fingerprint_of(first.pid)
        assert is_running(first.pid, fingerprint)
        change(tmp_path, pid=os.getpid())  # a living process, started at another time
        with Lock() as lock:
            lock.take(tmp_path)
            assert asked(first) == "True"
    first.wait()
    assert is_running(first.pid, fingerprint) is False
    assert is_running(os.getpid(), fingerprint_of())
    assert is_running(os.getpid(), f"another-boot{fingerprint_of()}") is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"token": 1}', "9" * 5000, "[" * 100_000])
def test_a_lock_that_can_not_be_read_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with Lock() as lock:
        lock.take(tmp_path)
        assert json.loads((tmp_path / LOCK_FILE).read_text()).keys() == {
            field.name for field in dataclasses.fields(Holder)
        }


@pytest.mark.parametrize("value", [None, -1, 2**70, 1e300, "x", ["x"], {}])
def test_a_lock_with_damaged_values_is_watched(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [field.name for field in dataclasses.fields(Holder) if field.name != "token"]
    for beats in (True, False):
        (tmp_path / LOCK_FILE).write_text(json.dumps({"token": "other", **dict.fromkeys(names, value)}))
        with Lock() as lock:
            if beats:
                toucher = threading.Timer(0.1, os.utime, [tmp_path / LOCK_FILE, (0, 0)])
                toucher.start()
                with pytest.raises(ConfigError, match="in use by process"):
                    lock.take(tmp_path)
                toucher.join()
            else:
                monkeypatch.setattr(locks, "WATCH_SECONDS", 0.2)
                lock.take(tmp_path)


def test_the_heartbeat_of_one_that_was_shut_out_is_not_that_of_the_new_lock(tmp_path: Path) -> None:
    with holder(tmp_path):
        change(tmp_path, token="another")  # noqa: S106
        before = (tmp_path / LOCK_FILE).stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / LOCK_FILE).stat().st_mtime_ns == before


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
