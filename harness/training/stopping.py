"""Turn signals and requests to stop into a stop of all ranks at the same step boundary."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

from harness.distributed.ranks import gloo_group
from harness.errors import StoppedError
from harness.signals import SIGNALS
from harness.training.flags import StoppingConfig

PREEMPTED_EXIT_CODE = 85  # "saved, run me again"
PREEMPTED_FILE = "preempted"
SECONDS_BETWEEN_LOOKS = 1.0  # how often to read the lock, a file that may be on a network


class StopReason(IntEnum):
    """Why to stop. The greatest value wins where ranks have different ones."""

    NONE = 0
    REQUESTED = 1
    TIME_LIMIT = 2
    PREEMPTED = 3
    SHUT_OUT = 4


class TimeLimit:
    """
    Watches the end of the job: whether to stop before it, asked at each step boundary.

    - ends_at: returns the end in seconds since 1970, None for never; asked at the start, and again before a stop, since
      a limit can be extended.
    - to_save: returns the seconds that a save is expected to take.
    """

    def __init__(
        self, config: StoppingConfig, *, ends_at: Callable[[], float | None], to_save: Callable[[], float]
    ) -> None:
        self.config, self._ask, self._to_save = config, ends_at, to_save
        self._ends_at = ends_at() if config.time_limit_margin_seconds > 0 else None
        self._last_at: float | None = None
        self._longest_step = 0.0

    def is_near(self, *, steps_ahead: int) -> bool:
        """Whether to stop now, if so many more steps are made before the save begins."""
        now = time.time()
        if self._last_at is not None:  # includes evaluations and saves: the next one may be due at once
            self._longest_step = max(self._longest_step, now - self._last_at)
        self._last_at = now
        needed = self.config.time_limit_margin_seconds + self._to_save() + (steps_ahead + 1) * self._longest_step
        if self._ends_at is None or now + needed < self._ends_at:
            return False
        self._ends_at = self._ask()
        return self._ends_at is not None and now + needed >= self._ends_at


class Stop:
    """
    Decides whether to stop, at each step boundary.

    - requested: whether a stop was requested from outside (Stop in the W&B app); read on each rank.
    - time_limit: the job's, on rank zero; None on other ranks and without a limit.
    - is_shut_out: whether another process has taken over the folder; asked once a second.

    With several ranks the answer travels on a separate gloo group while the next step runs, so that no step waits for
    it: they stop one step after the signal.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        requested: Callable[[], bool],
        time_limit: TimeLimit | None = None,
        is_shut_out: Callable[[], bool] = lambda: False,
    ) -> None:
        self.requested, self.time_limit, self.is_shut_out = requested, time_limit, is_shut_out
        self._looked_at = 0.0
        self._signalled = threading.Event()
        self._is_alone = accelerator.num_processes == 1
        self._group = None if self._is_alone else gloo_group(accelerator)
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._pending: torch.distributed.Work | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record SIGNALS during the block; launchers repeat them, so a second one changes nothing."""
        if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
            yield
            return

        def note(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - Python's signature
            self._signalled.set()

        with ExitStack() as stack:
            for each in SIGNALS:
                stack.callback(signal.signal, each, signal.signal(each, note))
            # A signal that was held since the start arrives now.
            stack.callback(
                signal.pthread_sigmask, signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            )
            yield

    def agreed(self) -> StopReason:
        """Collective: return why to stop, or NONE; the same on all ranks."""
        reason = self._reason()
        if self._is_alone:
            return reason
        answer = self.settled()
        self._flag.fill_(reason)
        self._pending = torch.distributed.all_reduce(
            self._flag, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return answer

    def _reason(self) -> StopReason:
        if time.monotonic() - self._looked_at > SECONDS_BETWEEN_LOOKS:
            self._looked_at = time.monotonic()
            if self.is_shut_out():
                return StopReason.SHUT_OUT
        if self._signalled.is_set():
            return StopReason.PREEMPTED
        if self.time_limit is not None and self.time_limit.is_near(steps_ahead=0 if self._is_alone else 1):
            return StopReason.TIME_LIMIT
        return StopReason.REQUESTED if self.requested() else StopReason.NONE

    def settled(self) -> StopReason:
        """Collective: wait for the exchange under way, if there is one, and return its result."""
        if self._pending is None:
            return StopReason.NONE
        self._pending.wait()
        self._pending = None
        return StopReason(int(self._flag.item()))


def stopped(reason: StopReason, *, at: str, saved_in: Path | None) -> StoppedError:
    """Return the error that ends a training `at` a step, whose checkpoint is in a folder, or is not saved."""
    done = f"saved; go on with --resume_from_checkpoint true --output_dir {saved_in}"
    if reason == StopReason.REQUESTED:
        message = f"Stopped from the W&B app at {at}: {'nothing was saved' if saved_in is None else done}."
        return StoppedError(message, exit_code=0, was_preempted=False)
    why = "The job's time limit is near: stopped" if reason == StopReason.TIME_LIMIT else "Preempted"
    message = f"{why} at {at}: {'nothing is saved with --save_strategy no' if saved_in is None else done}."
    return StoppedError(message, exit_code=1 if saved_in is None else PREEMPTED_EXIT_CODE, was_preempted=True)
