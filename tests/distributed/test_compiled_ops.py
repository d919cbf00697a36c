"""A lock that a killed compilation left must not stop all later starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.distributed.compiled_ops import OP, remove_stale_lock


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / OP).mkdir()
    (tmp_path / OP / "lock").touch()
    return tmp_path / OP / "lock"


def test_without_a_lock_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    remove_stale_lock()


def test_the_lock_of_a_process_that_is_gone_is_removed(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.utime(lock, (time.time() - 3600,) * 2)
    remove_stale_lock()
    assert not lock.exists()
    assert f"Removed {lock}" in caplog.text


def test_a_fresh_lock_is_given_its_time(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.distributed.compiled_ops.SECONDS_OF_A_LOCK", 1.5)
    began = time.monotonic()
    remove_stale_lock()
    assert time.monotonic() - began > 1
    assert not lock.exists()


def test_the_lock_of_one_that_compiles_stays(lock: Path) -> None:
    os.utime(lock, (time.time() - 3600,) * 2)
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=lock.parent, stdin=subprocess.PIPE) as compiler:
        remove_stale_lock()
        compiler.kill()
    assert lock.exists()
