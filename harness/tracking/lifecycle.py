"""The trackers of a run: opened when its folder exists, closed with its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from harness.tracking.run import TrackingConfig, WandbTracker, run_config, store_configuration, trackers


def open_trackers(
    accelerator: Accelerator,
    config: TrackingConfig,
    *,
    output_dir: Path,
    model: torch.nn.Module,
    arguments: Mapping[str, Any],
) -> None:
    """Start the trackers on rank zero and give them the configuration. Raises ConfigError for what W&B refuses."""
    accelerator.project_configuration.set_directories(str(output_dir))
    accelerator.log_with = filter_trackers(trackers(config, dir=str(output_dir)), accelerator.logging_dir)
    accelerator.init_trackers(config.project)
    store_configuration(accelerator.trackers, run_config(model, arguments))


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
