"""Signals and requests to stop, turned into a stop that all ranks make at the same step boundary."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

PREEMPTED_EXIT_CODE = 85  # "saved, run me again"
PREEMPTED_FILE = "preempted"
# The greatest reason wins where ranks have different ones.
NONE, REQUESTED, PREEMPTED = 0, 1, 2


class StoppedError(Exception):
    """The training has ended before its plan, at a step boundary. `exit_code` is the process's, one line says why."""

    def __init__(self, message: str, *, exit_code: int, was_preempted: bool) -> None:
        super().__init__(message)
        self.exit_code, self.was_preempted = exit_code, was_preempted


class Stop:
    """
    Whether to stop, asked at each step boundary.

    - requested: whether somebody asks for an end from outside (Stop in the W&B app); read on each rank.

    With several ranks the answer travels on a gloo group of its own while the next step runs, so that no step waits
    for it: they stop one step after the signal.
    """

    def __init__(self, accelerator: Accelerator, *, requested: Callable[[], bool]) -> None:
        self.requested = requested
        self._signalled = threading.Event()
        self._is_alone = accelerator.num_processes == 1
        self._group = None if self._is_alone else torch.distributed.new_group(backend="gloo")
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._pending: torch.distributed.Work | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as a note meanwhile; launchers repeat it, so that a second one means no more than the first."""
        if threading.current_thread() is not threading.main_thread():  # a notebook's worker: Python allows none there
            yield
            return
        before = signal.getsignal(signal.SIGTERM)

        def note(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - Python's signature
            self._signalled.set()

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def agreed(self) -> int:
        """Collective: NONE, REQUESTED or PREEMPTED, the same on all ranks."""
        reason = PREEMPTED if self._signalled.is_set() else REQUESTED if self.requested() else NONE
        if self._is_alone:
            return reason
        answer = self.settled()
        self._flag.fill_(reason)
        self._pending = torch.distributed.all_reduce(
            self._flag, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return answer

    def settled(self) -> int:
        """Collective: wait for the exchange under way, if there is one, and return what it came to."""
        if self._pending is None:
            return NONE
        self._pending.wait()
        self._pending = None
        return int(self._flag.item())
