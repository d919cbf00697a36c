"""The processes between the sweep agent and this one, and whether one of them has died."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("wandb", "wb")
WORDS_BEFORE = 4  # Python, its options, and -m


@functools.cache
def between_agent_and_us() -> tuple[int, ...]:
    """
    Return the numbers of the processes from this one's parent up to the agent.

    There are none where no `wandb agent` is among its ancestors: it is a function's, on another machine, or dead. It is
    found once: who looks after its death finds the system's first process.
    """
    import psutil

    found: list[int] = []
    try:
        for parent in psutil.Process().parents():
            found.append(parent.pid)
            if is_agent(parent.cmdline()):
                return tuple(found)
    except psutil.Error:
        pass
    return ()


def is_agent(command: Sequence[str]) -> bool:
    """Whether a command line is one of `wandb agent`."""
    for i, word in enumerate(command[:WORDS_BEFORE]):
        if Path(word).name in COMMANDS:
            return "agent" in command[i + 1 : i + 2]
    return False


def is_orphan() -> bool:
    """
    Whether the agent, or a launcher between it and this process, has died.

    Nobody would then end this process, and another agent may get its run. A child is known to have lost its parent by
    having another one: that needs no clock, and numbers that are used again do not matter.
    """
    above = between_agent_and_us()
    return bool(above) and any(map(_has_lost, (os.getpid(), *above), above))


def _has_lost(pid: int, parent: int) -> bool:
    import psutil

    try:
        return (os.getppid() if pid == os.getpid() else psutil.Process(pid).ppid()) != parent
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # it is not known
        return False
