"""Many processes at the same instant: one of them gets the lock, whatever was there before, and nothing blocks it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.checkpoint import lock as locks
from harness.checkpoint.lock import LOCK_FILE, MUTEX_FILE, Lock
from harness.errors import ConfigError

PROCESSES, RACES = 8, 200
# Forked once: each race begins at a barrier. What each process got is asked while all others still have what they got.
RACE = """
import errno, fcntl, multiprocessing, os, sys
from pathlib import Path
from harness.checkpoint import lock as locks
from harness.errors import ConfigError

folder, kind, processes, races = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
forked = multiprocessing.get_context("fork")
step, got = forked.Barrier(processes + 1), forked.Array("b", processes)

def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")

if kind.endswith("without locks"):
    fcntl.lockf, locks.SETTLE_SECONDS = no_locks, 1.0

def racer(i):
    for _ in range(races):
        lock = locks.Lock()
        step.wait()
        try:
            lock.take(folder)
            got[i] = 1
        except ConfigError as error:
            got[i] = 0 if "in use by process" in str(error) else -1
        step.wait()
        if got[i] and lock.is_lost():
            got[i] = -1
        step.wait()
        step.wait()
        lock.release()
        step.wait()

def leave_stale():
    if (child := os.fork()) == 0:
        locks.Lock().take(folder)
        os._exit(0)
    os.waitpid(child, 0)

racers = [forked.Process(target=racer, args=(i,), daemon=True) for i in range(processes)]
for each in racers:
    each.start()
for _ in range(races):
    if kind.startswith("stale"):
        leave_stale()
    step.wait()
    step.wait()
    step.wait()
    print(sum(got) if min(got) >= 0 else "wrong", flush=True)
    step.wait()
    step.wait()
for each in racers:
    each.join()
print(*sorted(path.name for path in folder.iterdir()), flush=True)
"""


def winners(folder: Path, kind: str, races: int) -> list[str]:
    """How many processes got the lock in each race; then the files that are left."""
    command = [sys.executable, "-c", RACE, str(folder), kind, str(PROCESSES), str(races)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["absent", "stale"])
def test_of_8_processes_at_one_instant_exactly_one_gets_the_lock(kind: str, tmp_path: Path) -> None:
    assert winners(tmp_path, kind, RACES) == ["1"] * RACES + [""]


@pytest.mark.parametrize("kind", ["absent, without locks", "stale, without locks"])
def test_exactly_one_gets_it_where_the_file_system_has_no_locks(kind: str, tmp_path: Path) -> None:
    assert winners(tmp_path, kind, 2) == ["1"] * 2 + [""]


IN_MUTEX = """
import os, sys, time
from pathlib import Path
from harness.checkpoint.lock import LOCK_FILE, _alone
with _alone(Path(sys.argv[1]) / LOCK_FILE):
    child = os.fork() if sys.argv[2] == "with a child" else 1
    if child:
        print(child, flush=True)
    time.sleep(100)
"""


@contextmanager
def in_mutex(folder: Path, *, with_child: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that is about to take a lock; its child lives on."""
    command = [sys.executable, "-c", IN_MUTEX, str(folder), "with a child" if with_child else "alone"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        try:
            yield process
        finally:
            process.kill()
            if with_child:
                os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("with_child", [False, True])
def test_a_process_killed_while_it_takes_the_lock_blocks_nobody(with_child: bool, tmp_path: Path) -> None:
    with in_mutex(tmp_path, with_child=with_child) as process:
        process.kill()
        process.wait()
        assert (tmp_path / MUTEX_FILE).is_file()
        began = time.monotonic()
        with Lock() as lock:
            lock.take(tmp_path)
            assert not lock.is_lost()
        assert time.monotonic() - began < locks.MUTEX_SECONDS / 2
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_hangs_while_it_takes_the_lock_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "MUTEX_SECONDS", 0.3)
    with in_mutex(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        with Lock() as lock, pytest.raises(ConfigError, match=r"has held harness\.lock\.mutex for 0\.3 s.* try again"):
            lock.take(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()


FORKING = """
import os, sys
from pathlib import Path
from harness.checkpoint.lock import LOCK_FILE, Lock
folder = Path(sys.argv[1])
with Lock() as lock:
    lock.take(folder)
    try:
        if (child := os.fork()) == 0:
            raise SystemExit
        os.waitpid(child, 0)
        print((folder / LOCK_FILE).is_file(), lock.is_lost())
    except SystemExit:
        pass
"""


def test_a_forked_child_does_not_give_the_lock_back(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "True False\n"
    assert list(tmp_path.iterdir()) == []


def test_a_mutex_that_another_user_left_is_no_obstacle(tmp_path: Path) -> None:
    with in_mutex(tmp_path) as process:
        assert (tmp_path / MUTEX_FILE).stat().st_mode & 0o777 == 0o666
        process.kill()
