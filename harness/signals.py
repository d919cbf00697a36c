"""
What a command settles before anything slow is imported: signals that come early, and standard streams that fail.

A job script ignores SIGUSR1 and SIGTERM so that they don't kill the launcher, and its children inherit that. SLURM
sends --signal up to a minute early, and start-up takes time: imports, data, W&B. This file imports nothing slow.
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send; with SLURM's --signal the user chooses
INTERRUPTED_EXIT_CODE = 130  # what a shell says of a command that Ctrl-C has ended
PREEMPTED_EXIT_CODE = 85  # "saved, run me again"
PREEMPTED_FILE = "preempted"  # the same in the folder of a run, as launchers turn each code into 1
SECONDS_TO_TAKE_OUTPUT = 10.0  # how long a stream may be full that does not wait by itself


def prepare_command() -> None:
    """Prepare a process that is a command of ours and nobody else's. Call it before any slower import."""
    hold()
    keep_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def hold() -> None:
    """Block those of SIGNALS that are ignored: Linux keeps a blocked signal pending until it is unblocked."""
    ignored = {each for each in SIGNALS if signal.getsignal(each) == signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, ignored)


def _leave(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - Python's signature
    """End at once: nothing has begun, and in the middle of an import KeyboardInterrupt becomes another error."""
    with suppress(OSError):
        os.write(2, b"harness: Interrupted.\n")
    os._exit(INTERRUPTED_EXIT_CODE)


def _leave_silently(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - Python's signature
    os._exit(INTERRUPTED_EXIT_CODE)


def leave_word_to_others() -> None:
    """Let another rank say that Ctrl-C has come, while this one prepares."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _leave_silently)


def end_preparation() -> None:
    """From here on Ctrl-C is Python's own KeyboardInterrupt: there is something to close."""
    if signal.getsignal(signal.SIGINT) in (_leave, _leave_silently):
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Noted:
    """Which signal has asked a command to end, 0 for none yet, and whether Ctrl-C has come after that."""

    def __init__(self) -> None:
        self.signum, self.is_at_once = 0, False

    @property
    def was_interrupted(self) -> bool:
        """Whether a person has asked, by Ctrl-C."""
        return self.signum == signal.SIGINT

    def note(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - Python's signature
        """Take a signal down."""
        self.is_at_once = self.is_at_once or (signum == signal.SIGINT and self.signum != 0)
        self.signum = self.signum or signum


@contextmanager
def noting() -> Iterator[Noted]:
    """Note, during the block, the signals that ask a command to end, which then ends what it has started."""
    noted, before = Noted(), {}
    for each in (*SIGNALS, signal.SIGHUP, signal.SIGINT):
        # What a shell ignores for a job in the background stays ignored; what a job script ignores is meant for us.
        if each in SIGNALS or signal.getsignal(each) != signal.SIG_IGN:
            before[each] = signal.signal(each, noted.note)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield noted
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for each, handler in before.items():
            signal.signal(each, handler)


def interrupt(pid: int) -> None:
    """Send a process what Ctrl-C sends."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGINT)


def end_process(pid: int, *, at_once: bool = False) -> None:
    """Ask a process to end, with its group if it leads one; or end it at once. One that is gone is left."""
    number = signal.SIGKILL if at_once else signal.SIGTERM
    with suppress(ProcessLookupError, PermissionError):
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            os.kill(pid, number)


def outlive_stops() -> None:
    """
    In a worker of the data: leave a stop to the training, which gets the same signals where they go to all processes.

    A second SIGTERM is that of the training's end: torch and multiprocessing send it to a worker that does not end.
    """
    for each in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _pass_over_first)


def _pass_over_first(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - Python's signature
    signal.signal(signum, signal.SIG_DFL)


def keep_streams() -> None:
    """
    Let nothing that is printed end this process: a reader that has gone, a full disk, a closed terminal, an encoding.

    A standard stream that is closed becomes /dev/null. Otherwise the next file that is opened, a checkpoint's, has its
    number, and what libraries print goes into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or (isinstance(stream, io.TextIOWrapper) and stream.fileno() == number):
            kept = _kept(stream, number)
            setattr(sys, name, kept)
            setattr(sys, f"__{name}__", kept)


def lost_output(stream: Any) -> OSError | None:
    """Why a standard stream of `keep_streams` could not write something; None if it could write everything."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw.failure if isinstance(raw, _Output) else None


def say(text: str, stream: TextIO | None) -> None:
    """Print a line on a stream, if that can take it: what is only shown ends nothing."""
    with suppress(OSError, ValueError, AttributeError):  # ValueError: closed; AttributeError: there is none
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError as error:
            print(text.encode(error.encoding, "backslashreplace").decode(error.encoding), file=stream, flush=True)


class _Output(io.FileIO):
    """
    A file whose `write` never fails: what can't be written is lost. It stands below sys.stdout and sys.stderr.

    Inherited, as Python's text and buffer layers ask a raw file for all that one has. `failure` is the last one.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                written: int | None = super().write(left)
                if written is not None:
                    left = left[written:]
                elif not select.select([], [self], [], SECONDS_TO_TAKE_OUTPUT)[1]:
                    raise BlockingIOError(f"not read for {SECONDS_TO_TAKE_OUTPUT:g} s")
        except OSError as error:
            self.failure = error
        return size


def _kept(stream: io.TextIOWrapper | None, number: int) -> io.TextIOWrapper:
    """Return the same stream with an _Output below it; characters that its encoding lacks are escaped."""
    if stream is not None:
        with suppress(OSError):
            stream.flush()
    raw = _Output(number, "wb", closefd=False)
    is_unbuffered = stream is not None and isinstance(stream.buffer, io.RawIOBase)  # python -u
    below: Any = raw if is_unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        below,
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=number == 2 if stream is None else stream.line_buffering,
        write_through=stream is not None and stream.write_through,
    )
