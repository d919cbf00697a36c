"""
What can go wrong that is no bug of ours: one tree, each kind with the exit code of a process that ends by it.

HarnessError            1  all of them; the message is one line that says what to do
├── ConfigError         2  bad input or configuration: the user can put it right
├── CheckpointError     1  a checkpoint could not be written; the older ones are as they were
├── NonFiniteError      1  a module gave NaN or infinity
├── RankError           1  another rank has failed
├── StoppedError     85/0  the training has ended before its plan, saved
└── TrackingError       1  W&B has not what it should; a training goes on, a command ends
    ├── UnreachableError   no credentials, or no server
    ├── NoCredentialsError neither a key in the environment nor a login
    ├── RowsError          rows can't be delivered so that each is there once and in its place
    ├── SyncError          `wandb sync` failed, or W&B lacks what it sent
    ├── StagingError       what is staged is not what was to be delivered, and never will be
    ├── DeliveryError      W&B has not what was sent of an artifact
    └── BusyError          another process brings this run to W&B

`exit_code_of` is the boundary that turns them into a message and an exit code, for every command.
"""

from __future__ import annotations

from collections.abc import Callable


class HarnessError(Exception):
    """What ends a command with one message and `exit_code`, without a traceback."""

    exit_code = 1


class ConfigError(HarnessError):
    """
    Something the user can put right: bad input, bad configuration. The process ends with exit code 2.

    It may be several `problems` that were found together.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        several = [f"{len(problems)} mistakes:", *(f"- {problem}" for problem in problems)]
        super().__init__(problems[0] if len(problems) == 1 else "\n".join(several))


def exit_code_of(
    work: Callable[[], int], say: Callable[[int, str], object], *, interrupted: str = "Interrupted."
) -> int:
    """
    Do the work of a command and return its exit code; `say` is given the code and the message of what ends it.

    130 after Ctrl-C. What is a bug of ours raises with its traceback.
    """
    try:
        return work()
    except HarnessError as error:
        code, message = error.exit_code, str(error)
    except KeyboardInterrupt:
        code, message = 130, interrupted
    say(code, message)
    return code


class CheckpointError(HarnessError):
    """A checkpoint could not be written; the older ones are as they were."""


class NonFiniteError(HarnessError):
    """A module gave NaN or infinity; the message names the first one."""


class RankError(HarnessError, RuntimeError):
    """Another rank has failed; its own traceback says where."""


class StoppedError(HarnessError):
    """The training has ended before its plan, at a step boundary. `exit_code` is the process's, one line says why."""

    def __init__(self, message: str, *, exit_code: int, was_preempted: bool) -> None:
        super().__init__(message)
        self.exit_code, self.was_preempted = exit_code, was_preempted


class TrackingError(HarnessError):
    """W&B has not what it should have, or can't be asked."""


class UnreachableError(TrackingError):
    """What keeps us from the server, for the user to put right."""


class NoCredentialsError(TrackingError):
    """Neither a key in the environment nor a login."""


class RowsError(TrackingError):
    """Why rows can't be delivered so that each is there once and in its place."""


class SyncError(TrackingError):
    """`wandb sync` failed, or W&B lacks what it sent."""


class StagingError(TrackingError):
    """What is staged is not what was to be delivered, and never will be."""


class DeliveryError(TrackingError):
    """What W&B has is not what was sent, or what keeps an artifact from being sent."""


class BusyError(TrackingError):
    """Another process brings this run to W&B."""
