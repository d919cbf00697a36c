"""The lock on the folder of a run: one attempt writes at a time, and a takeover fences the earlier attempt."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from harness.checkpoint.processes import fingerprint_of, is_running
from harness.errors import ConfigError
from harness.files import write_whole
from harness.slurm import SlurmJob, slurm_job

logger = logging.getLogger(__name__)

LOCK_FILE = "harness.lock"
MUTEX_FILE = "harness.lock.mutex"
HEARTBEAT_SECONDS = 10.0
# Who can't be seen from here counts as dead when its heartbeat stood still for so long; older versions beat each 20.
WATCH_SECONDS = 60.0
SECONDS_BETWEEN_LOOKS = 0.25
# To read a lock and write it anew takes milliseconds; a server of files may need longer to forget a machine that died.
MUTEX_SECONDS = 60.0
# Without a mutex the last one to write has the lock, and the others see that after so long.
SETTLE_SECONDS = 3.0
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True, kw_only=True)
class Holder:
    """
    The process that holds a lock; `taken_at` in seconds since 1970, `job` is "" outside SLURM.

    `created_at` is the fingerprint of the process. Its name, and the fields, are those of older versions, which would
    take a lock with others for none; they wrote the time of the process's creation.
    """

    token: str
    host: str = ""
    pid: int = 0
    created_at: str | float = ""
    taken_at: float = 0.0
    job: str = ""
    restart_count: int = 0


@dataclass(frozen=True)
class Seen:
    """A lock as it was read: who holds it, and its heartbeat, of which only a change says something."""

    holder: Holder
    beat: tuple[int, int]


class Heartbeats:
    """The heartbeats of locks, watched on a clock of our own: machines' clocks differ, and are set."""

    def __init__(self) -> None:
        self._since: dict[Path, tuple[Seen, float]] = {}

    @property
    def num_watched(self) -> int:
        """Of how many locks it was asked."""
        return len(self._since)

    def stands_still(self, path: Path, seen: Seen) -> bool:
        """Whether it has not changed for WATCH_SECONDS, in which this was called now and then."""
        now = time.monotonic()
        last, since = self._since.get(path, (None, now))
        self._since[path] = (seen, since if last == seen else now)
        return now - self._since[path][1] >= WATCH_SECONDS


class Lock:
    """
    The lock on an output_dir, a file in it. Rank zero takes it; on the other ranks its methods do nothing.

    A file that a killed process left is no obstacle. A process whose lock was taken over learns it from `is_lost`,
    which writers ask before they put something in place: after a node failure the old rank may run on for minutes.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(4)
        self._path: Path | None = None
        self._pid = 0
        self._ended = threading.Event()
        self._heartbeats = Heartbeats()
        self._watched: Seen | None = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self, output_dir: Path, *, seconds: float = math.inf) -> bool:
        """
        Wait until it is known that the lock of a folder may be taken, without taking it; False: not after `seconds`.

        That takes up to WATCH_SECONDS where the process that holds it can't be seen from here. Raises as `take` does.
        """
        path, until = output_dir / LOCK_FILE, time.monotonic() + seconds
        while self._path is None and (seen := _read(path)) is not None and not self._may_take(path, seen):
            if not self._watch(path, seen, until):
                return False
        return True

    def take(self, output_dir: Path) -> None:
        """
        Take the lock of a folder that exists; a second call changes nothing.

        Raises ConfigError while another process holds it, unless that is an earlier attempt of our SLURM job; OSError.
        """
        if self._path is not None:
            return
        path, job = output_dir / LOCK_FILE, slurm_job()
        while self._path is None:
            self.check(output_dir)
            with _alone(path) as is_alone:
                seen = _read(path)
                if seen is not None and not self._may_take(path, seen):
                    continue  # somebody was faster
                own = Holder(
                    token=self.token,
                    host=platform.node(),
                    pid=os.getpid(),
                    created_at=fingerprint_of(),
                    taken_at=time.time(),
                    job="" if job is None else job.id,
                    restart_count=0 if job is None else job.restart_count,
                )
                write_whole(path, json.dumps(asdict(own)) + "\n", suffix=self.token)
                if not is_alone:
                    time.sleep(SETTLE_SECONDS)
                if (now := _read(path)) is not None and now.holder.token == self.token:
                    self._path, self._pid = path, os.getpid()
        threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True).start()

    def is_lost(self) -> bool:
        """Whether another process has taken over this lock, even if it has finished and released it since."""
        if self._path is None:
            return False
        seen = _read(self._path)
        return seen.holder.token != self.token if seen is not None else not self._path.exists()

    def release(self) -> None:
        """Remove the lock, if it is still ours."""
        self._ended.set()
        path, self._path = self._path, None
        if path is None or os.getpid() != self._pid:  # a forked child has no lock
            return
        # If the folder or its mutex is out of reach the file stays: this process will soon be seen to be gone.
        with suppress(OSError, ConfigError), _alone(path):
            if (seen := _read(path)) is not None and seen.holder.token == self.token:
                path.unlink()

    def _may_take(self, path: Path, seen: Seen) -> bool:
        gone = _is_gone(seen.holder, slurm_job())
        return self._heartbeats.stands_still(path, seen) if gone is None else gone

    def _watch(self, path: Path, seen: Seen, until: float) -> bool:
        """
        Return when the holder is seen to be gone, or another one is there; False if that is open at `until`.

        Raises ConfigError if it is alive.
        """
        holder, name = seen.holder, f"process {seen.holder.pid} on {seen.holder.host or 'an unknown machine'}"
        if (gone := _is_gone(holder, slurm_job())) is None and (
            self._watched is None or self._watched.holder != holder
        ):
            self._watched = seen
            logger.warning(
                "%s is held by %s, which can't be seen from here (another machine or container, or an older version): "
                "watching its heartbeat for %g s.",
                *(path, name, WATCH_SECONDS),
            )
        while gone is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            now = _read(path)
            if now is None or now.holder != holder:
                return True
            if self._heartbeats.stands_still(path, now):
                logger.warning("%s was silent for %g s: its lock is taken over.", name, WATCH_SECONDS)
                return True
            gone = False if now != self._watched else _is_gone(holder, slurm_job())
            if gone is None and time.monotonic() > until:
                return False
        if not gone:
            raise ConfigError(
                f"--output_dir={path.parent} is in use by {name} since {_as_time(holder.taken_at)}: wait for "
                f"its end, or take another folder. If it is gone for sure, delete {path}."
            )
        return True

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            if (path := self._path) is not None:
                with suppress(OSError), path.open(encoding="utf-8") as file:
                    # By the open file: the path may be another's lock in the next moment.
                    holder = _parsed(file.read())
                    if holder is not None and holder.token == self.token:
                        os.utime(file.fileno())


def is_held(output_dir: Path, heartbeats: Heartbeats) -> bool | None:
    """
    Whether an attempt of the training is running in a folder, on any machine; None if there is no lock file.

    One that can't be seen from here is, until `heartbeats` has watched it for long enough.
    """
    path = output_dir / LOCK_FILE
    seen = _read(path)
    if seen is None:
        return None
    gone = _is_gone(seen.holder, None)
    return not (heartbeats.stands_still(path, seen) if gone is None else gone)


def holder_of(output_dir: Path) -> Holder | None:
    """Return who holds the lock of a folder, also if that process has ended; None if nobody has locked it."""
    seen = _read(output_dir / LOCK_FILE)
    return None if seen is None else seen.holder


def _is_gone(holder: Holder, job: SlurmJob | None) -> bool | None:
    """Whether the holder has ended, or is to be fenced: an earlier attempt of the job. None: it can't be seen."""
    if job is not None and job.id == holder.job and job.restart_count > holder.restart_count:
        return True
    if (holder.pid, holder.created_at) == (os.getpid(), fingerprint_of()) and holder.created_at:
        return True  # an earlier training of this process
    runs = is_running(holder.pid, holder.created_at)
    if isinstance(holder.created_at, int | float) and holder.host != platform.node():
        return None
    return None if runs is None else not runs


def _read(path: Path) -> Seen | None:
    """Return the lock; None if there is none, or if the file can't be read."""
    try:
        with path.open(encoding="utf-8") as file:  # opened, so that a network's file system asks its server
            holder, state = _parsed(file.read()), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.debug("%s is no lock: %s", path, error)
        return None
    return None if holder is None else Seen(holder, (state.st_ino, state.st_mtime_ns))


def _parsed(text: str) -> Holder | None:
    """Return the holder; fields that are missing, of another type or of another version are left out."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("token"), str):
        return None
    kinds: dict[str, Any] = {"pid": int, "restart_count": int, "taken_at": int | float, "created_at": str | int | float}
    given = {each.name: content.get(each.name) for each in fields(Holder)}
    return Holder(**{name: value for name, value in given.items() if isinstance(value, kinds.get(name, str))})


def _as_time(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "an unknown time"


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """
    Let one process at a time look at a lock and change it; yield False where the file system can't do that.

    It is a record lock (fcntl), which ends with its process however that ends, which children don't inherit, and which
    network file systems have too. Raises ConfigError if another process holds it for long; OSError.
    """
    path = lock.with_name(MUTEX_FILE)
    deadline = time.monotonic() + MUTEX_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # it is another user's, who has said the same
                os.fchmod(descriptor, 0o666)  # all who may write to the folder must be able to open what a kill left
            is_alone = _wait_for(descriptor, path, deadline)
            # Who was before us has removed the file that we waited for.
            if is_alone and os.fstat(descriptor).st_nlink == 0:
                continue
            try:
                yield is_alone
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _wait_for(descriptor: int, path: Path, deadline: float) -> bool:
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--output_dir={path.parent}: another process has held {path.name} for {MUTEX_SECONDS:g} s, in which "
                "it is decided who writes there. It hangs, or its machine is gone: try again later."
            )
        time.sleep(0.01)
