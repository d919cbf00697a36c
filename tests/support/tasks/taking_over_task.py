"""The parity task, but another process takes the folder of the run over while it trains, at a given sample."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.checkpoint.lock import LOCK_FILE
from harness.tasks import Task, TaskConfig
from tests.support.tasks import parity_task


def build(config: TaskConfig) -> Task:
    options = config.task_args or {}
    task = parity_task.build(replace(config, task_args=None))
    collate, path, count = task.data_collator, Path(options["folder"]) / LOCK_FILE, 0

    def taken_over(samples: list[Any]) -> Any:
        nonlocal count
        count += 1
        if count == options["at"]:
            holder = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**holder, "token": "another"}), encoding="utf-8")
            time.sleep(1.1)  # it is looked at once a second
        return collate(samples)

    return replace(task, data_collator=taken_over)
