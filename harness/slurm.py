"""The SLURM job that a training runs in: who it is, when its time is over, and what its attempts have come to."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.files import write_whole

logger = logging.getLogger(__name__)

JOB_FILE = "slurm.json"
SECONDS_FOR_SQUEUE = 20.0
# Deaths of one job in a row that began at the same step: the next would be no better.
MOST_DEATHS = 2
FINISHED, PREEMPTED, STOPPED, FAILED = "finished", "preempted", "stopped", "failed"


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A job, or a task of an array (then its id is ARRAY_TASK), and how often it has been requeued."""

    id: str
    restart_count: int = 0
    name: str = ""
    partition: str = ""
    nodes: str = ""
    is_batch: bool = False

    @property
    def output_dir(self) -> Path:
        """Where its run is kept if nobody says: the same folder in each of its attempts."""
        return Path("runs") / f"job-{self.id}"

    def facts(self) -> dict[str, Any]:
        """What the configuration of a run says of it."""
        names = ("id", "name", "restart_count", "partition", "nodes")
        return {f"slurm/{'job_' if name in ('id', 'name') else ''}{name}": getattr(self, name) for name in names}


def slurm_job() -> SlurmJob | None:
    """The job that this process is of; None outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not job:
        return None
    return SlurmJob(
        id=job,
        restart_count=int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0),
        name=os.environ.get("SLURM_JOB_NAME", ""),
        partition=os.environ.get("SLURM_JOB_PARTITION", ""),
        nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
        is_batch=os.environ.get("ENVIRONMENT") == "BATCH",
    )


def time_limit_at() -> float | None:
    """When the job ends, in seconds since 1970, by squeue or SLURM_JOB_END_TIME; None if it has all the time."""
    job = slurm_job()
    if job is None:
        return None
    told = _ask_squeue(job) or os.environ.get("SLURM_JOB_END_TIME", "")
    return float(told) if told.isdecimal() else None


def _ask_squeue(job: SlurmJob) -> str:
    # The variable is what was known at the start, and older versions have none; squeue is not in every container.
    squeue = shutil.which("squeue")
    if squeue is None:
        return ""
    command = [squeue, "--noheader", f"--jobs={job.id}", "--format=%e"]
    variables = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(  # noqa: S603 - squeue, and an id that SLURM gave
            command, env=variables, capture_output=True, text=True, timeout=SECONDS_FOR_SQUEUE, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("squeue did not say when the job ends: %s", error)
        return ""
    return done.stdout.strip()


class JobRecord:
    """
    The attempts of jobs, in the folder of their run: a list, each with how it ended. No end is a death without a word.

    Rank zero's; without a job it stays without effect.
    """

    def __init__(self, output_dir: Path, job: SlurmJob | None) -> None:
        self.path, self.job = output_dir / JOB_FILE, job

    def says_finished(self) -> bool:
        """Whether this very job has done all that it was asked for, in an earlier attempt."""
        return any(self._is_earlier(attempt) and attempt.get("ended") == FINISHED for attempt in self._attempts()[-1:])

    def begin(self, *, from_step: int) -> None:
        """Note an attempt that goes on at a step. Raises ConfigError if earlier ones have died there; OSError."""
        if self.job is None:
            return
        attempts = self._attempts()
        deaths = 0
        for attempt in reversed(attempts):
            if (
                not self._is_earlier(attempt)
                or attempt.get("from_step") != from_step
                or attempt.get("ended") == PREEMPTED
            ):
                break
            deaths += 1
        if deaths >= MOST_DEATHS:
            raise ConfigError(
                f"Job {self.job.id} has died {deaths} times since step {from_step} without a checkpoint in between, so "
                f"it is not started once more. See what its attempts have said; then submit a new job with "
                f"--output_dir {self.path.parent} --resume_from_checkpoint auto, perhaps with a smaller --save_steps."
            )
        facts = {name: value for name, value in asdict(self.job).items() if name != "is_batch"}
        self._write([*attempts, {**facts, "from_step": from_step, "began_at": time.time(), "ended": None}])

    def end(self, how: str) -> None:
        """Note how this attempt ends: FINISHED, PREEMPTED, STOPPED or FAILED. A failure to write is a warning."""
        if self.job is None:
            return
        attempts = self._attempts()
        own = [attempt for attempt in attempts if self._key(attempt) == (self.job.id, self.job.restart_count)]
        if not own:  # it ends before it began
            return
        own[-1]["ended"] = how
        try:
            self._write(attempts)
        except OSError as error:
            logger.warning("%s can't be written: %s", self.path, error)

    def _is_earlier(self, attempt: Mapping[str, Any]) -> bool:
        # Of this job before it was requeued: a second command in the same attempt is somebody's will.
        job, count = self._key(attempt)
        return self.job is not None and job == self.job.id and count < self.job.restart_count

    @staticmethod
    def _key(attempt: Mapping[str, Any]) -> tuple[str, int]:
        return str(attempt.get("id")), int(attempt.get("restart_count", 0))

    def _attempts(self) -> list[dict[str, Any]]:
        try:
            attempts = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            logger.warning("%s can't be read, a new one is begun: %s", self.path, error)
            return []
        return [attempt for attempt in attempts if isinstance(attempt, dict)] if isinstance(attempts, list) else []

    def _write(self, attempts: list[dict[str, Any]]) -> None:
        write_whole(self.path, json.dumps(attempts, indent=2) + "\n")
