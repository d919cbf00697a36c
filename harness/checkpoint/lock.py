"""The lock on the folder of a run: one attempt writes at a time, and a takeover fences the earlier attempt."""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from harness.distributed.ranks import is_running
from harness.errors import ConfigError
from harness.files import write_whole
from harness.slurm import SlurmJob, slurm_job

logger = logging.getLogger(__name__)

LOCK_FILE = "harness.lock"
HEARTBEAT_SECONDS = 20.0
# A process on another machine can't be checked: it counts as dead when its lock was not touched for so long.
SILENCE_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock; `created_at` and `taken_at` in seconds since 1970, `job` is "" outside SLURM."""

    token: str
    host: str
    pid: int
    created_at: float
    taken_at: float
    job: str
    restart_count: int


class Lock:
    """
    The lock on an output_dir, a file in it. Rank zero takes it; on the other ranks its methods do nothing.

    A file that a killed process left is no obstacle. A process whose lock was taken over learns it from `is_lost`,
    which writers ask before they put something in place: after a node failure the old rank may run on for minutes.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(4)
        self._path: Path | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self, output_dir: Path) -> None:
        """
        Take the lock of a folder that exists; a second call changes nothing.

        Raises ConfigError while another process holds it, unless that is an earlier attempt of our SLURM job; OSError.
        """
        if self._path is not None:
            return
        path = output_dir / LOCK_FILE
        job = slurm_job()
        holder = _read(path)
        if holder is not None and not _may_shut_out(holder, path, job):
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.taken_at))
            raise ConfigError(
                f"--output_dir={output_dir} is in use by process {holder.pid} on {holder.host} since {since}: wait for "
                f"its end, or take another folder. If it is gone for sure, delete {path}."
            )
        own = Holder(
            token=self.token,
            host=platform.node(),
            pid=os.getpid(),
            created_at=psutil.Process().create_time(),
            taken_at=time.time(),
            job="" if job is None else job.id,
            restart_count=0 if job is None else job.restart_count,
        )
        write_whole(path, json.dumps(asdict(own)) + "\n", suffix=self.token)
        self._path = path
        threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True).start()

    def is_lost(self) -> bool:
        """Whether another process has taken over this lock, even if it has finished and released it since."""
        if self._path is None:
            return False
        holder = _read(self._path)
        return holder.token != self.token if holder is not None else not self._path.exists()

    def release(self) -> None:
        """Remove the lock, if it is still ours."""
        self._ended.set()
        path, self._path = self._path, None
        if path is not None and (holder := _read(path)) is not None and holder.token == self.token:
            with suppress(OSError):
                path.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            path = self._path
            if path is not None and not self.is_lost():
                with suppress(OSError):
                    os.utime(path)


def is_held(output_dir: Path) -> bool | None:
    """Whether an attempt of the training is running in a folder, on any machine; None if there is no lock file."""
    path = output_dir / LOCK_FILE
    holder = _read(path)
    return None if holder is None else not _may_shut_out(holder, path, None)


def _read(path: Path) -> Holder | None:
    """Return the holder of the lock; None if there is none, or if the file can't be read."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.debug("%s is no lock: %s", path, error)
        return None


def _may_shut_out(holder: Holder, path: Path, job: SlurmJob | None) -> bool:
    if job is not None and job.id == holder.job and job.restart_count > holder.restart_count:
        return True
    if holder.host == platform.node():
        return holder.pid == os.getpid() or not is_running(holder.pid, holder.created_at)
    try:
        return time.time() - path.stat().st_mtime > SILENCE_SECONDS
    except FileNotFoundError:
        return True
