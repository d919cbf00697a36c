"""The end of a W&B run, and the numbers it has come to."""

from __future__ import annotations

import math
import numbers
import threading
from contextlib import suppress
from typing import Any

from harness.tracking.run.open import failures

# What uploads, and then the end of the run, get of the time that a preempted job has left.
PREEMPTED_SECONDS = 10.0


def end_run(run: Any, exit_code: int, *, is_preempting: bool) -> None:
    """Finish the run; one that is being preempted for so long only. wandb writes all of it to the disk at exit."""
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
    """The numbers of the summary, as the Trainer puts them into an artifact's metadata: NaN is null there."""
    found: dict[str, float | None] = {}
    for name, value in dict(run.summary).items():
        if isinstance(value, numbers.Real) and not name.startswith("_"):
            number = value if isinstance(value, int) else float(value)
            found[name] = number if math.isfinite(number) else None
    return found
