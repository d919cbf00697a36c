"""
Run a command that is asked to end when the process that started it dies: `python -m harness.sweep.tied PID COMMAND...`.

Linux can do that. Elsewhere the command runs on, until who takes its trial up ends it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
SIGTERM = 15


def words_tied(command: Sequence[str]) -> list[str]:
    """Return the command line that runs a command tied to this process."""
    return [sys.executable, "-m", "harness.sweep.tied", str(os.getpid()), *command]


def run(parent: int, command: Sequence[str]) -> None:
    """Become the command. It ends at once if the parent has died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0)
    if os.getppid() == parent:
        os.execvp(command[0], list(command))  # noqa: S606 - it is what was asked for


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2:])
