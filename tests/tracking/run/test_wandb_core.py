"""The process that delivers a dead attempt's rows is waited for, and ended if it stays."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.checkpoint.processes import is_running
from harness.tracking.run.wandb_core import describe_processes, wait_for_cores
from tests.support.faulty_training import Training, committed
from tests.support.wandb_server import WandbServer

GONE = [2**22 - 1, 0.0]


def started(seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])


def processes(core: subprocess.Popen[bytes], **other: Any) -> dict[str, Any]:
    cores = [[core.pid, psutil.Process(core.pid).create_time()]]
    return {"host": platform.node(), "owner": GONE, "cores": cores, **other}


def test_a_core_that_is_still_delivering_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    core = started(1.0)
    began = time.monotonic()
    wait_for_cores(processes(core), patience=20)
    assert core.wait() == 0
    assert 0.3 < time.monotonic() - began < 15
    assert caplog.text == ""


def test_a_core_that_stays_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    core = started(60)
    with caplog.at_level(logging.WARNING):
        wait_for_cores(processes(core), patience=0.3)
    assert not psutil.pid_exists(core.pid)
    core.wait()
    assert "did not end within 0.3 s" in caplog.text


@pytest.mark.parametrize("which", ["owner runs", "other host", "other process", "nothing"])
def test_what_is_not_a_dead_attempts_is_left_alone(which: str) -> None:
    core = started(60)
    try:
        given = processes(core)
        if which == "owner runs":
            given["owner"] = describe_processes()["owner"]
        elif which == "other host":
            given["host"] = "elsewhere"
        elif which == "other process":
            given["cores"][0][1] -= 100  # the number was given out again
        else:
            given = {}
        wait_for_cores(given, patience=0.3)
        assert core.poll() is None
    finally:
        core.kill()
        core.wait()


def test_a_zombie_is_not_running() -> None:
    dead = started(0)
    created_at = psutil.Process(dead.pid).create_time()
    for _ in range(200):
        if psutil.Process(dead.pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    assert not is_running(dead.pid, created_at)
    dead.wait()


@pytest.mark.slow
def test_artifacts_from_before_its_death_are_counted_at_the_end(tmp_path: Path) -> None:
    """wandb-core is killed by the system when memory runs out: the training goes on, and the end tells of all."""
    with WandbServer(tmp_path / "server") as server:
        training = Training(tmp_path / "run", server, pace=0.2)
        training.reach(14)
        deadline = time.monotonic() + 60
        while len(list(committed(server))) < 2:  # the architecture and checkpoint-10
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (core,) = [each for each in psutil.Process(training.process.pid).children() if each.name() == "wandb-core"]
        core.kill()
        training.ended()
        assert "wandb's process has died: another one takes over" in training.err
        assert len(list(committed(server))) == 5
        assert "31 rows, all confirmed by the server" in training.report
        assert any(line.startswith("5 artifacts confirmed by the server: ") for line in training.report)
