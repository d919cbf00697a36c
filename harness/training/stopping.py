"""Turn signals and requests to stop into a stop of all ranks at the same step boundary."""

from __future__ import annotations

import _thread
import bdb
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

from harness.distributed.launch import passes_on, shutdown_seconds
from harness.distributed.ranks import gloo_group, tell_all
from harness.errors import StoppedError
from harness.signals import INTERRUPTED_EXIT_CODE, PREEMPTED_EXIT_CODE, SIGNALS
from harness.training.flags import StoppingConfig, Word
from harness.training.state import TrainState

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 1.0  # how often to read the lock, a file that may be on a network
SECONDS_BETWEEN_WORDS = 0.02  # a small file, which is waited for
# What a person is told at the first Ctrl-C.
SAVES = "the step, evaluation or save under way is finished, then the training is saved and ends"
SAVES_NOTHING = "the step or evaluation under way is finished, then the training ends; --save_strategy no saves nothing"
COMPLETES = "the training is complete, its model is written before it ends"
SAME_PRESS_SECONDS = 0.5  # a launcher and the terminal may both send the signal of one Ctrl-C


class StopReason(IntEnum):
    """Why to stop. The greatest value wins where ranks have different ones."""

    NONE = 0
    AT_STEP = 1
    REQUESTED = 2
    TIME_LIMIT = 3
    PREEMPTED = 4
    ORPHANED = 5
    INTERRUPTED = 6
    SHUT_OUT = 7


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


@dataclass(frozen=True, kw_only=True)
class Agent:
    """
    What is known of the sweep agent that has started this process.

    - is_gone: whether it, or a launcher in between, has died; asked once a second.
    - was_stopped: whether it is W&B that wants a stop. Asked on rank zero when a signal has come: the agent ends a run
      that was stopped in the app by the same signal by which a scheduler preempts it.
    """

    is_gone: Callable[[], bool] = lambda: False
    was_stopped: Callable[[], bool] = lambda: False


class Stop:
    """
    Decides whether to stop, at each step boundary.

    - requested: whether a stop was requested from outside (Stop in the W&B app); read on each rank.
    - time_limit: the job's, on rank zero; None on other ranks and without a limit.
    - is_shut_out: whether another process has taken over the folder; asked once a second.
    - agent: the sweep agent above this process, if there is one.
    - saves: whether a stop leaves a checkpoint.
    - at_step: the step at which to stop in any case; None: none.
    - is_at_once: whether a second Ctrl-C has come: then nothing is waited for.

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
        agent: Agent | None = None,
        saves: bool = True,
        at_step: int | None = None,
    ) -> None:
        self.requested, self.time_limit, self.is_shut_out = requested, time_limit, is_shut_out
        self.agent, self.at_step = agent, at_step
        self.saves, self.is_at_once = saves, False
        self._looked_at = 0.0
        self._noted = StopReason.NONE
        self._interrupted_at: float | None = None
        self._process: int | None = None
        self.promise = ""
        self._is_alone, self._speaks = accelerator.num_processes == 1, accelerator.is_main_process
        self._group = None if self._is_alone else gloo_group(accelerator)
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._pending: torch.distributed.Work | None = None

    @contextmanager
    def listening(self, promise: str = "") -> Iterator[None]:
        """
        Record signals during the block: those of a scheduler, of a terminal that is closed, and Ctrl-C.

        Launchers repeat the first ones, so a second one changes nothing; a second Ctrl-C raises KeyboardInterrupt. At
        the first one a person is told the `promise`, which may change meanwhile; default: that of a training.
        Ignored signals of a terminal stay ignored (`nohup`, a job in the background), and Ctrl-C stays pdb's.
        """
        if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
            yield
            return
        self._process = os.getpid()
        self.promise = promise or (SAVES if self.saves else SAVES_NOTHING)
        with ExitStack() as stack:
            stack.callback(self._end_listening)
            for each in SIGNALS:
                stack.callback(signal.signal, each, signal.signal(each, self._note))
            for each, note in ((signal.SIGHUP, self._note), (signal.SIGINT, self._interrupt)):
                before = signal.getsignal(each)
                if before != signal.SIG_IGN and not isinstance(getattr(before, "__self__", None), bdb.Bdb):
                    stack.callback(signal.signal, each, signal.signal(each, note))
            # A signal that was held since the start arrives now.
            stack.callback(
                signal.pthread_sigmask, signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            )
            yield

    @property
    def is_noted(self) -> bool:
        """Whether a signal, or another process, asks this rank to stop."""
        return self._noted != StopReason.NONE or self.is_shut_out()

    def _end_listening(self) -> None:
        self._process = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # torch's launcher answers a second Ctrl-C by SIGTERM.
        if signum == signal.SIGTERM and self._interrupted_at is not None and passes_on("SIGTERM"):
            self._interrupt(signum, frame)
        self._noted = max(self._noted, StopReason.PREEMPTED)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._process is None or _is_at_prompt(frame):
            signal.default_int_handler(signum, frame)
        if self._process != os.getpid():  # a worker of the data, which has this handler by its fork
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            self._noted = StopReason.INTERRUPTED
            if self._speaks:  # in a thread: the code that was interrupted may hold the lock of the log, or of stderr
                _thread.start_new_thread(self._tell, ())
        elif now - self._interrupted_at > SAME_PRESS_SECONDS:
            self.is_at_once = True
            signal.default_int_handler(signum, frame)

    def _tell(self) -> None:
        limit = ""
        if passes_on("SIGINT"):
            limit = (
                f" The launcher kills all processes {shutdown_seconds():.0f} s from now: what is not saved then is "
                "lost, the older checkpoints stay whole."
            )
        logger.warning("Ctrl-C: %s. Ctrl-C again ends it at once.%s", self.promise, limit)

    def is_at(self, step: int) -> bool:
        """Whether the training is not to go beyond a step; each rank knows it by itself."""
        return self.at_step is not None and step >= self.at_step

    def agreed(self, step: int = 0) -> StopReason:
        """Collective: return why to stop after a step, or NONE; the same on all ranks."""
        answer, began = self._agreed(), self._interrupted_at
        answer = max(answer, StopReason.AT_STEP) if self.is_at(step) else answer
        if answer in (StopReason.PREEMPTED, StopReason.ORPHANED) and self.agent is not None:
            answer = self._explained(answer, self.agent)
        tells = answer == StopReason.INTERRUPTED and self.saves and self._speaks
        if tells and began is not None and passes_on("SIGINT"):
            left = max(0.0, began + shutdown_seconds() - time.monotonic())
            logger.warning("The training is saved now; the launcher kills all processes in %.0f s.", left)
        return answer

    def _explained(self, reason: StopReason, agent: Agent) -> StopReason:
        """Collective: return the reason, or REQUESTED if that is what W&B says."""
        flag = torch.tensor([StopReason.REQUESTED if self._speaks and agent.was_stopped() else reason])
        if not self._is_alone:
            torch.distributed.broadcast(flag, src=0, group=self._group)
        return StopReason(int(flag.item()))

    def _agreed(self) -> StopReason:
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
            if self.agent is not None and self.agent.is_gone():
                self._noted = max(self._noted, StopReason.ORPHANED)
        if self._noted != StopReason.NONE:
            return self._noted
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

    def was_interrupted(self) -> bool:
        """Collective: whether Ctrl-C has come on any rank, after the last step."""
        if self._is_alone:
            return self._noted == StopReason.INTERRUPTED
        self._flag.fill_(self._noted)
        torch.distributed.all_reduce(self._flag, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return int(self._flag.item()) == StopReason.INTERRUPTED


class Pruning:
    """
    Waits after each evaluation for the word of the worker that follows this trial; without a file it does nothing.

    - is_stopping: whether a stop has been noted; then nobody is waited for, and the next attempt asks again.
    """

    def __init__(self, file: str | None, accelerator: Accelerator, *, is_stopping: Callable[[], bool]) -> None:
        self._file = None if file is None else Path(file).expanduser()
        self._accelerator, self._is_stopping = accelerator, is_stopping

    def heed(self, state: TrainState) -> None:
        """Collective: raise StoppedError, without a save, if the trial ends here; it never does at its last step."""
        if self._file is None or state.should_stop or state.global_step >= state.max_steps:
            return
        if tell_all(self._accelerator, lambda: self._word(state.global_step)):
            reason = f"Pruned at step {state.global_step} of {state.max_steps}: the sweep ends this trial here"
            raise StoppedError(reason, exit_code=0, was_preempted=False, pruned_at=state.global_step)

    def _word(self, step: int) -> bool:
        while self._file is not None and not self._is_stopping():
            if (ends := Word.read(self._file).on(step)) is not None:
                return ends
            time.sleep(SECONDS_BETWEEN_WORDS)
        return False


def _is_at_prompt(frame: FrameType | None) -> bool:
    """Whether this code is called from the prompt of a debugger, which is that of Python's `cmd`."""
    while frame is not None:
        if frame.f_code.co_name == "cmdloop":
            return True
        frame = frame.f_back
    return False


def resume_flags(output_dir: Path) -> tuple[str, ...]:
    """Return the flags with which a training in this folder goes on."""
    return ("--resume_from_checkpoint", "true", "--output_dir", str(output_dir))


def stopped(reason: StopReason, *, at: str, saved_in: Path | None, until: int) -> StoppedError:
    """
    Return the error that ends a training `at` a step, whose checkpoint is in a folder, or is not saved.

    `until` is the step to which a training goes on that was to stop at a step.
    """
    flags = () if saved_in is None else resume_flags(saved_in)
    if reason == StopReason.REQUESTED:
        done = "nothing was saved" if saved_in is None else "saved"
        return StoppedError(f"Stopped from the W&B app at {at}: {done}", flags=flags, exit_code=0, was_preempted=False)
    if reason == StopReason.AT_STEP:
        return StoppedError(
            f"Stopped at {at}, as --stop_at_step says: saved",
            flags=(*flags, "--stop_at_step", str(until)),
            exit_code=0,
            was_preempted=False,
        )
    done = "nothing is saved with --save_strategy no" if saved_in is None else "saved"
    if reason == StopReason.INTERRUPTED:
        return StoppedError(
            f"Interrupted at {at}: {done}", flags=flags, exit_code=INTERRUPTED_EXIT_CODE, was_preempted=False
        )
    why = {
        StopReason.TIME_LIMIT: "The job's time limit is near: stopped",
        StopReason.ORPHANED: "The sweep agent, or the launcher under it, has ended: stopped",
    }.get(reason, "Preempted")
    exit_code = 1 if saved_in is None else PREEMPTED_EXIT_CODE
    return StoppedError(f"{why} at {at}: {done}", flags=flags, exit_code=exit_code, was_preempted=True)
