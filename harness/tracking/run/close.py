"""The end of a W&B run: what it has come to, and what of it has arrived. Asked, since wandb is quiet about losses."""

from __future__ import annotations

import math
import numbers
import shlex
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.tracking.artifacts.queue import UploadResult
from harness.tracking.client import failures
from harness.tracking.rows.server import RowCount

# What uploads, and then the end of the run, get of the time that a preempted job has left.
PREEMPTED_SECONDS = 10.0
# `wandb sync` passes online runs over.
UPLOAD = "python -m harness.tracking upload"


def end_run(run: Any, exit_code: int, *, is_preempting: bool) -> None:
    """Finish the run, within PREEMPTED_SECONDS if it is being preempted: wandb writes all to the disk at exit."""
    if not is_preempting:
        run.finish(exit_code=exit_code)
        return

    def attempt() -> None:
        with suppress(*failures()):
            run.finish(exit_code=exit_code)

    # The finish_timeout of an open run can't be changed: wandb's process has its own copy.
    thread = threading.Thread(target=attempt, name="wandb-finish", daemon=True)
    thread.start()
    thread.join(PREEMPTED_SECONDS)


def summary_numbers(run: Any) -> dict[str, float | None]:
    """Return the numbers of the summary as the Trainer puts them into an artifact's metadata: NaN is null."""
    found: dict[str, float | None] = {}
    for name, value in dict(run.summary).items():
        if isinstance(value, numbers.Real) and not name.startswith("_"):
            number = value if isinstance(value, int) else float(value)
            found[name] = number if math.isfinite(number) else None
    return found


def describe_delivery(
    run: Any, rows: RowCount | None, uploads: UploadResult | None, *, home: Path | None = None
) -> list[str]:
    """
    Say what has arrived and what has not, with the command that delivers it: a line for rows, one for artifacts.

    `home` is the folder that holds the journal; default: the run's own folder, which has the rows then.
    """
    lines = []
    folder = Path(run.settings.sync_dir)
    if rows is not None and not run.disabled and not (run.offline and rows.is_whole):
        known = "an unknown number" if rows.confirmed is None else str(rows.confirmed)
        if rows.is_whole:
            lines.append(f"{known} rows, all confirmed by the server")
        elif run.offline:  # nothing has been said of it: wandb goes on as if the disk took all
            lines.append(f"{known} of {rows.sent} rows are in {folder}, the others are lost (a full disk?)")
        elif uploads is not None and uploads.command and str(folder.parents[1]) in shlex.split(uploads.command):
            lines.append(f"{known} of {rows.sent} rows confirmed by the server; deliver the rest as the artifacts")
        else:
            command = f"{UPLOAD} {shlex.quote(str(home or folder))}"
            lines.append(f"{known} of {rows.sent} rows confirmed by the server; deliver the rest: {command}")
    if uploads is not None:
        lines.append(uploads.describe())
    return lines
