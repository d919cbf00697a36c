"""The trackers of a run: opened when its folder exists, closed with its outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from harness.tracking.run import WandbTracker, store_configuration


def open_trackers(
    accelerator: Accelerator,
    chosen: Sequence[str | WandbTracker],
    project: str,
    *,
    output_dir: Path,
    configuration: Mapping[str, Any],
) -> None:
    """Start the chosen trackers on rank zero and give them the configuration."""
    accelerator.project_configuration.set_directories(str(output_dir))
    accelerator.log_with = filter_trackers(list(chosen), accelerator.logging_dir)
    accelerator.init_trackers(project)
    store_configuration(accelerator.trackers, configuration)


def close_trackers(accelerator: Accelerator, *, exit_code: int) -> None:
    """End the W&B run as finished (0) or failed, without a collective: it may be an error that brings us here."""
    for tracker in accelerator.trackers:
        if isinstance(tracker, WandbTracker):
            tracker.finish(exit_code)


def describe_trackers(accelerator: Accelerator) -> list[tuple[str, str]]:
    """Rank zero: where each tracker keeps the run."""
    rows = []
    for tracker in accelerator.trackers:
        where = tracker.describe() if isinstance(tracker, WandbTracker) else str(accelerator.logging_dir)
        if where:
            rows.append(("W&B" if isinstance(tracker, WandbTracker) else tracker.name, where))
    return rows
