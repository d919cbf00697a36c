"""The SLURM job that a training runs in: its identity, its time limit, and the record of its attempts."""

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
# After so many attempts in a row that began at the same step and died, another one would die too.
MOST_DEATHS = 2
FINISHED, PREEMPTED, STOPPED, FAILED = "finished", "preempted", "stopped", "failed"


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A job, or a task of an array (its id is then ARRAY_TASK), and how often it has been requeued."""

    id: str
    restart_count: int = 0
    name: str = ""
    partition: str = ""
    nodes: str = ""
    is_batch: bool = False

    @property
    def output_dir(self) -> Path:
        """Where the run is kept unless a flag says otherwise: the same folder in each attempt."""
        return Path("runs") / f"job-{self.id}"

    def facts(self) -> dict[str, Any]:
        """The job's details for the configuration of a run."""
        names = ("id", "name", "restart_count", "partition", "nodes")
        return {f"slurm/{'job_' if name in ('id', 'name') else ''}{name}": getattr(self, name) for name in names}


def slurm_job() -> SlurmJob | None:
    """Return the job that this process belongs to; None outside SLURM."""
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
    """Return when the job ends, in seconds since 1970, from squeue or SLURM_JOB_END_TIME; None without a limit."""
    job = slurm_job()
    if job is None:
        return None
    told = _ask_squeue(job) or os.environ.get("SLURM_JOB_END_TIME", "")
    return float(told) if told.isdecimal() else None


def _ask_squeue(job: SlurmJob) -> str:
    # The variable holds the limit at the start, and older versions lack it; not every container has squeue.
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
    The attempts of jobs, listed in the folder of their run with how each ended; an attempt without an end was killed.

    For rank zero. Without a job its methods do nothing.
    """

    def __init__(self, output_dir: Path, job: SlurmJob | None) -> None:
        self.path, self.job = output_dir / JOB_FILE, job

    def says_finished(self) -> bool:
        """Whether an earlier attempt of this very job has completed the training."""
        return any(self._is_earlier(attempt) and attempt.get("ended") == FINISHED for attempt in self._attempts()[-1:])

    def begin(self, *, from_step: int) -> None:
        """
        Record an attempt that starts at a step.

        Raises ConfigError if earlier ones have died at that step; OSError.
        """
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
        """
        Record how this attempt ends: FINISHED, PREEMPTED, STOPPED or FAILED.

        A failure to write is only a warning.
        """
        if self.job is None:
            return
        attempts = self._attempts()
        own = [attempt for attempt in attempts if self._key(attempt) == (self.job.id, self.job.restart_count)]
        if not own:  # the attempt ends before `begin` was called
            return
        own[-1]["ended"] = how
        try:
            self._write(attempts)
        except OSError as error:
            logger.warning("%s can't be written: %s", self.path, error)

    def _is_earlier(self, attempt: Mapping[str, Any]) -> bool:
        # Only from before a requeue: a second command in the same attempt was started on purpose.
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
