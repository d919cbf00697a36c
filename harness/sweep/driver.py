"""Start the workers of a sweep on this machine, pass a stop on to them, and say what has come of the study."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from harness.signals import PREEMPTED_EXIT_CODE, Noted, end_process, interrupt, say
from harness.sweep.launch import SECONDS_BETWEEN_LOOKS
from harness.sweep.study import Sweep
from harness.sweep.tied import words_tied
from harness.sweep.worker import Worker, parent_watch

VISIBLE = "CUDA_VISIBLE_DEVICES"
SECONDS_FOR_NVIDIA_SMI = 20.0


def run_workers(sweep: Sweep, argv: Sequence[str], *, workers: int, noted: Noted) -> bool:
    """
    Let so many workers work on the study until it is over, or a stop is noted; returns whether one was told to stop.

    The study is there. One worker is this process; `argv` is the command line for more. One that dies is told, and not
    started again: the others go on with its trial.
    """
    if workers == 1:
        return not Worker(sweep, noted).run()
    devices = visible_devices()
    running: dict[int, subprocess.Popen[bytes]] = {}
    told: set[int] = set()
    was_stopped = False
    try:
        for number in range(workers):
            running[number] = _start(argv, number, share_of(devices, number, workers))
        while running:
            for number, process in [*running.items()]:
                if (code := process.poll()) is not None:
                    del running[number]
                    was_stopped = was_stopped or code == PREEMPTED_EXIT_CODE
                    _tell_end(number, code, len(running), noted)
            if noted.signum:
                _pass_on(running, told, noted)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return was_stopped or noted.signum != 0
    finally:
        for process in running.values():
            end_process(process.pid)


def work(sweep: Sweep, noted: Noted) -> bool:
    """Be one of several workers, until the study is over or, False, a stop is noted or the driver has died."""
    return Worker(sweep, noted, is_alone=parent_watch()).run()


def _start(argv: Sequence[str], number: int, devices: Sequence[str]) -> subprocess.Popen[bytes]:
    # Tied to us: one that still loads its libraries could not tell later that we have died meanwhile.
    command = words_tied([sys.executable, "-m", "harness", "sweep", f"--worker={number}", *argv])
    variables = {**os.environ, VISIBLE: ",".join(devices)} if devices else None
    # In a group of its own: Ctrl-C comes to the driver, which passes it on once.
    return subprocess.Popen(  # noqa: S603 - this very command
        command, stdin=subprocess.DEVNULL, start_new_session=True, env=variables
    )


def _pass_on(running: dict[int, subprocess.Popen[bytes]], told: set[int], noted: Noted) -> None:
    """Tell each worker once to stop; after a second Ctrl-C end them, and by that their trainings, at once."""
    for process in running.values():
        if process.pid not in told:
            end_process(process.pid)
            told.add(process.pid)
        elif noted.is_at_once:
            interrupt(process.pid)


def _tell_end(number: int, code: int, left: int, noted: Noted) -> None:
    if code not in (0, PREEMPTED_EXIT_CODE) and not noted.signum:
        how = f"was killed by signal {-code}" if code < 0 else f"has ended with exit code {code}"
        say(f"worker {number} {how}; {left} go on, with its trial too", sys.stderr)


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, by their numbers or names; [] if there are none, or one can't know."""
    if (given := os.environ.get(VISIBLE)) is not None:
        return [each.strip() for each in given.split(",") if each.strip()]
    if (command := shutil.which("nvidia-smi")) is None:
        return []
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(  # noqa: S603 - nvidia-smi
            [command, "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=SECONDS_FOR_NVIDIA_SMI,
            check=True,
        )
        return found.stdout.split()
    return []


def share_of(devices: Sequence[str], worker: int, workers: int) -> list[str]:
    """Return the GPUs of one of several workers: as many for each, or one that it shares where there are too few."""
    each = len(devices) // workers
    if each == 0:
        return [devices[worker % len(devices)]] if devices else []
    return list(devices[worker * each : (worker + 1) * each])
