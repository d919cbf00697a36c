"""Who works on a trial: one worker at a time, known by the lock that a run's folder has, with its heartbeat."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.checkpoint.lock import Heartbeats, Lock, holder_of, is_held
from harness.errors import ConfigError

SECONDS_BETWEEN_TRIES = 0.2
SECONDS_TO_MAKE = 300.0  # for another worker to make the study


class Leases:
    """
    The leases on the trials of a study, each a lock in the trial's folder of `folder`.

    A worker that died is seen at once on its own machine. Elsewhere its heartbeat is watched for as long as that of a
    training is, so a `Leases` has to be asked again and again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._heartbeats = Heartbeats()
        self._own: dict[int, Lock] = {}

    def place(self, number: int) -> Path:
        """Return the folder in which what belongs to the work on a trial is kept."""
        return self.folder / str(number)

    def is_held(self, number: int) -> bool:
        """Whether a worker works on a trial, as far as one can see from here."""
        return bool(is_held(self.place(number), self._heartbeats))

    def take(self, number: int) -> Lock | None:
        """Take a trial's lease; None while another worker has it, or may have. Raises OSError."""
        place = self.place(number)
        holder, own = holder_of(place), self._own.get(number)
        if holder is not None and own is not None and holder.token == own.token:
            return None  # a lock does not keep its own process out
        if is_held(place, self._heartbeats):
            return None
        place.mkdir(parents=True, exist_ok=True)
        lock = Lock()
        try:
            lock.take(place)
        except ConfigError:  # somebody was faster
            return None
        self._own[number] = lock
        return lock

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let one process at a time make or change the study. Raises ConfigError if another one does so for long."""
        self.folder.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + SECONDS_TO_MAKE
        with Lock() as lock:
            while True:
                try:
                    lock.take(self.folder)
                    break
                except ConfigError:
                    if time.monotonic() > until:
                        raise
                time.sleep(SECONDS_BETWEEN_TRIES)
            yield
