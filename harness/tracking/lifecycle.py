"""The trackers of a run: chosen, opened when its folder exists, closed with its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from harness.distributed.accelerator import software
from harness.distributed.ranks import tell_all
from harness.slurm import slurm_job
from harness.tracking.flags import TrackingConfig, check_environment, check_names
from harness.tracking.lineage import facts_of
from harness.tracking.recorded import launch_config, store_configuration
from harness.tracking.rows.local import LocalRows
from harness.tracking.run.attempts import Attempts
from harness.tracking.run.open import check_credentials
from harness.tracking.run.sweep import record
from harness.tracking.tracker import WandbTracker


def trackers(
    config: TrackingConfig,
    *,
    dir: str,  # noqa: A002 - wandb's name for it
    resumes: bool = False,
) -> list[str | WandbTracker]:
    """
    What to give `Accelerator(log_with=...)`; W&B's files go to `dir` unless --wandb_dir says otherwise.

    `resumes`: the training goes on where another attempt ended, and so does its run.

    Raises ConfigError, on every rank alike, for what W&B doesn't understand and for a lack of credentials.
    """
    config.check_trackers()
    chosen: list[str | WandbTracker] = [name for name in config.tracker_names() if name != "wandb"]
    if not config.uses_wandb:
        return chosen
    check_environment()
    check_names(config)
    check_credentials(config)
    attempts = None if config.wandb_mode == "disabled" else Attempts(Path(dir), resumes=resumes)
    config = replace(config, wandb_dir=config.wandb_dir or dir)
    return [WandbTracker(config, output_dir=dir, attempts=attempts), *chosen]


def local_tracker(output_dir: Path, *, resumes: bool) -> WandbTracker:
    """Return what takes W&B's place in a training without it: the rows go to the journal of `output_dir`."""
    return WandbTracker(TrackingConfig(report_to=["none"]), local=LocalRows(output_dir, resumes=resumes))


def wandb_tracker(chosen: list[str | WandbTracker]) -> WandbTracker:
    """The W&B tracker among the chosen, or one that stays silent."""
    found = (tracker for tracker in chosen if isinstance(tracker, WandbTracker))
    return next(found, None) or WandbTracker(TrackingConfig(report_to=["none"]))


def open_trackers(
    accelerator: Accelerator,
    chosen: list[str | WandbTracker],
    project: str,
    *,
    output_dir: Path,
    configuration: Mapping[str, Any],
) -> None:
    """Collective: start the chosen trackers on rank zero and give them the configuration. Raises ConfigError."""

    def start() -> None:
        accelerator.project_configuration.set_directories(str(output_dir))
        accelerator.log_with = filter_trackers(list(chosen), accelerator.logging_dir)
        accelerator.init_trackers(project)
        store_configuration(accelerator.trackers, configuration)
        job = slurm_job()
        of_job = {} if job is None else job.facts()
        ours = {"launch": launch_config(), "software": software(), **record()}
        facts = {"harness": ours, **of_job, **facts_of(output_dir)}
        store_configuration([tracker for tracker in accelerator.trackers if tracker.name == "wandb"], facts)

    tell_all(accelerator, start)


def close_trackers(accelerator: Accelerator, *, exit_code: int, leaves_open: bool = False) -> None:
    """
    End the W&B run as finished (0) or failed, without a collective: it may be an error that brings us here.

    `leaves_open`: a later attempt goes on with the run, or has done so already; nothing is waited for.
    """
    for tracker in accelerator.trackers:
        if isinstance(tracker, WandbTracker) and leaves_open:
            tracker.abandon()
        elif isinstance(tracker, WandbTracker):
            tracker.finish(exit_code)


def describe_links(accelerator: Accelerator) -> list[tuple[str, str]]:
    """Rank zero: the addresses at which the run can be watched. After the start."""
    described = [tracker.describe() for tracker in accelerator.trackers if isinstance(tracker, WandbTracker)]
    return [("W&B", text) for text in described if _is_link(text)]


def describe_trackers(accelerator: Accelerator) -> list[tuple[str, str]]:
    """Rank zero: where each tracker keeps the run if it has no link, and what W&B's server has of it. After the end."""
    rows = []
    for tracker in accelerator.trackers:
        if isinstance(tracker, WandbTracker):
            kept = [] if _is_link(tracker.describe()) else [tracker.describe()]
            rows += [("W&B", line) for line in (*kept, *tracker.report()) if line]
        elif accelerator.logging_dir:
            rows.append((tracker.name, str(accelerator.logging_dir)))
    return rows


def _is_link(text: str) -> bool:
    return text.startswith(("http://", "https://"))
