"""A task that takes a while to build: each rank writes down when it began and ended, one of them may raise."""

from __future__ import annotations

import os
import time
from pathlib import Path

from harness.tasks import Task, TaskConfig
from tests.support.tasks import parity_task


def build(config: TaskConfig) -> Task:
    """`folder` gets a file for each rank; with `raises` rank 1 fails."""
    options, rank = dict(config.task_args or {}), os.environ.get("RANK", "0")
    began = time.monotonic()
    time.sleep(0.5)
    if rank == "1" and options.get("raises"):
        raise RuntimeError("this node has no such file")
    task = parity_task.build(TaskConfig())
    (Path(options["folder"]) / f"rank-{rank}").write_text(f"{began} {time.monotonic()}", encoding="utf-8")
    return task
