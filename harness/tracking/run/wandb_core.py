"""wandb-core, the process that sends the rows: it outlives a training that was killed, and holds its run."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

from harness.checkpoint.processes import fingerprint_of, is_running
from harness.tracking.client import failures

logger = logging.getLogger(__name__)

NAME = "wandb-core"
PATIENCE_SECONDS = 20.0


def describe_processes() -> dict[str, Any]:
    """Return this process and its wandb-core processes in JSON types, for a later attempt to recognize them."""
    cores = []
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if child.name().startswith(NAME):
                    cores.append([child.pid, fingerprint_of(child.pid)])
    return {"host": platform.node(), "owner": [os.getpid(), fingerprint_of()], "cores": cores}


def wait_for_cores(processes: Mapping[str, Any], *, patience: float = PATIENCE_SECONDS) -> None:
    """
    Wait for the wandb-core of an attempt that was killed: it may still be delivering. After `patience` seconds end it.

    One whose training is running, on this machine or another, is left alone.
    """
    if not processes or processes["host"] != platform.node() or is_running(*processes["owner"]):
        return
    deadline = time.monotonic() + patience
    for pid, fingerprint in processes["cores"]:
        while is_running(pid, fingerprint) and time.monotonic() < deadline:
            time.sleep(0.05)
        if is_running(pid, fingerprint):
            logger.warning("wandb-core (%d) of the attempt before did not end within %g s: ended.", pid, patience)
            with suppress(psutil.Error):
                psutil.Process(pid).kill()
                psutil.Process(pid).wait(5)


def abandon_run() -> None:
    """End wandb-core without ending the run: another attempt has taken it over, and sends what is missing."""
    import wandb

    for pid, _ in describe_processes()["cores"]:
        with suppress(psutil.Error):
            psutil.Process(pid).kill()
            psutil.Process(pid).wait(5)
    with suppress(*failures()):
        wandb.teardown()
