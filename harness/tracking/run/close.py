"""The end of a W&B run: what it has come to, and what of it has arrived. Asked, since wandb is quiet about losses."""

from __future__ import annotations

import math
import numbers
import shlex
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.tracking.artifacts.queue import UploadResult
from harness.tracking.client import failures
from harness.tracking.rows.server import rows_arrived

# What uploads, and then the end of the run, get of the time that a preempted job has left.
PREEMPTED_SECONDS = 10.0
# wandb's process may write the last rows of an offline run after its end.
WRITTEN_SECONDS = 5.0
SYNC = "harness sync"


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


def describe_rows(run: Any, sent: int | None, uploads: UploadResult | None, *, home: Path | None) -> list[str]:
    """
    Say how many of the rows have arrived, and the command that delivers the others, in a line or none.

    `sent` is the step behind the last row; it is the number of rows unless the user gives steps. `home` is the folder
    that holds the journal; None: the run's own folder has the rows.
    """
    if run.disabled:
        return []
    folder, arrived = Path(run.settings.sync_dir), None if sent is None else _arrived(run, sent)
    if sent is not None and arrived is not None and arrived[1] >= sent:
        return [] if run.offline else [f"{arrived[0]} rows, all confirmed by the server"]
    rows = f"{'an unknown number' if arrived is None else arrived[0]} of {sent} rows"
    if arrived is not None and arrived[0] != arrived[1]:
        rows = f"{arrived[0]} rows, up to step {arrived[1] - 1} of {(sent or 0) - 1},"
    if run.offline:  # nothing has been said of it: wandb goes on as if the disk took all
        return [f"{rows} are in {folder}, the others are lost (a full disk?)"]
    if uploads is not None and uploads.command and str(folder.parents[1]) in shlex.split(uploads.command):
        return [f"{rows} confirmed by the server; deliver the rest as the artifacts"]
    command = f"{SYNC} {shlex.quote(str(home or folder))}"
    return [f"{rows} confirmed by the server; deliver the rest: {command}"]


def _arrived(run: Any, sent: int) -> tuple[int, int] | None:
    """Return what `rows_arrived` does, of an offline run when all is in its file or WRITTEN_SECONDS are over."""
    deadline = time.monotonic() + WRITTEN_SECONDS
    while ((found := rows_arrived(run)) is None or found[1] < sent) and run.offline and time.monotonic() < deadline:
        time.sleep(0.2)
    return found
