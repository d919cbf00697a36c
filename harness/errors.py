"""
The errors that are not bugs of this package, as one tree, with the exit code that each gives the process.

HarnessError            1  base class; the message is one line that says what to do
├── ConfigError         2  bad input or configuration, which the user can correct
├── CheckpointError     1  a checkpoint could not be written; the older ones are untouched
├── NonFiniteError      1  the output of a module, a loss or gradients contain NaN or infinity
├── MemoryShortError    1  the device is out of memory
├── RankError           1  another rank has failed
├── WorkerError         1  a process that reads the data was killed
├── StoppedError  85/130/0 the training saved its state and stopped before its planned end
└── TrackingError       1  something is missing in W&B; a training goes on, a command ends
    ├── UnreachableError   no credentials, or no server
    ├── NoCredentialsError neither a key in the environment nor a login
    ├── RowsError          rows can't be delivered exactly once and in order
    ├── SyncError          `wandb sync` failed, or W&B lacks what it sent
    ├── StagingError       staged files do not match what was to be delivered; a retry can't help
    ├── DeliveryError      an artifact could not be delivered, or arrived incomplete
    └── BusyError          another process brings this run to W&B

`exit_code_of` is the boundary that turns them into a message and an exit code, for every command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence

from harness.masking import masked

# What torch says when a process that reads the data has ended, and what gloo and NCCL say when a rank has.
DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed|exited)")
KILLED_BY = re.compile(r"is killed by signal: ([\w ]*\w)")
DEAD_RANK = re.compile(r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|remote process exited")
# What torch says, beside an error of its own class, where memory can't be had: on the CPU, and of a driver.
SHORT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)
LESS_MEMORY = "use a smaller --per_device_train_batch_size, --activation_checkpointing, or --bf16"
GO_ON = "The checkpoints are whole: go on with --resume_from_checkpoint auto"


class HarnessError(Exception):
    """Base class of errors that end a command with one message and `exit_code`, without a traceback."""

    exit_code = 1


class ConfigError(HarnessError):
    """
    Bad input or configuration, which the user can correct. The process ends with exit code 2.

    It may report several `problems` that were found together.
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
    Run the `work` of a command and return its exit code; on an error `say` gets that code and the masked message.

    Ctrl-C gives 130, and the message that its KeyboardInterrupt has, else `interrupted`. Any error other than
    HarnessError is a bug and is raised with its traceback.
    """
    try:
        return work()
    except HarnessError as error:
        code, message = error.exit_code, masked(str(error))
    except KeyboardInterrupt as error:
        code, message = 130, masked(str(error)) or interrupted
    say(code, message)
    return code


def meaning_of(error: RuntimeError) -> HarnessError | None:
    """
    Return the error that says what torch's means, where a traceback would not: a shortage of memory, a killed process.

    None if it is none of these.
    """
    text = f"{error} {error.__cause__}"
    first = (str(error).strip().splitlines() or [""])[0]
    if is_memory_short(error):
        return MemoryShortError(f"Out of memory: {LESS_MEMORY}. ({first})")
    if worker := DEAD_WORKER.search(text):
        return WorkerError(f"Data worker {worker[1]} {_death_of_worker(text)}. {GO_ON}.")
    if DEAD_RANK.search(text):
        return RankError(
            f"Another rank has ended: its own output says why. One that says nothing was killed, as a rule because "
            f"memory ran out (the launcher shows SIGKILL, `sacct` OUT_OF_MEMORY). {GO_ON}. ({first})"
        )
    return None


def is_memory_short(error: BaseException) -> bool:
    """Whether an error says that the device, or the host, has no memory left for what was asked."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; it may not be imported
        return True
    return isinstance(error, RuntimeError) and SHORT_OF_MEMORY.search(str(error)) is not None


def _death_of_worker(text: str) -> str:
    killed = KILLED_BY.search(text)
    if killed is None:
        return "has ended without an error of its own: --dataloader_num_workers 0 shows where"
    if "shared memory" in text:
        return f"was killed ({killed[1]}): use a larger /dev/shm (docker: --shm-size), or fewer workers"
    remedy = "use fewer --dataloader_num_workers, a smaller --dataloader_prefetch_factor, or more memory"
    return f"was killed ({killed[1]}), as a rule because memory ran out: {remedy}"


class CheckpointError(HarnessError):
    """A checkpoint could not be written; the older ones are untouched."""


class NonFiniteError(HarnessError):
    """The output of a module, a loss or gradients contain NaN or infinity; the message says where they began."""


class MemoryShortError(HarnessError):
    """The device has no memory left for the training."""


class RankError(HarnessError, RuntimeError):
    """Another rank has failed; that rank's traceback says where."""


class WorkerError(HarnessError):
    """A process that reads the data was killed."""


class StoppedError(HarnessError):
    """
    The training stopped before its planned end; the message is one line that says why, and how to go on.

    `flags` are those with which it goes on, none if it can't; the whole `command` is known where one was typed.
    `pruned_at` is the step at which a sweep has ended the trial, which does not go on.
    """

    def __init__(
        self,
        reason: str,
        *,
        exit_code: int,
        was_preempted: bool,
        flags: Sequence[str] = (),
        command: str = "",
        pruned_at: int | None = None,
    ) -> None:
        # Without a full stop after it, which would be copied with the command.
        goes_on = f"; go on with: {command}" if command else f"; go on with {shlex.join(flags)}" if flags else "."
        super().__init__(f"{reason}{goes_on}")
        self.reason, self.flags = reason, tuple(flags)
        self.exit_code, self.was_preempted, self.pruned_at = exit_code, was_preempted, pruned_at


class TrackingError(HarnessError):
    """Something is missing in W&B, or W&B can't be reached."""


class UnreachableError(TrackingError):
    """W&B can't be reached for a reason that the user can correct."""


class NoCredentialsError(TrackingError):
    """There is neither an API key in the environment nor a login."""


class RowsError(TrackingError):
    """Rows can't be delivered exactly once and in order; the message says why."""


class SyncError(TrackingError):
    """`wandb sync` failed, or W&B lacks what it sent."""


class StagingError(TrackingError):
    """Staged files do not match what was to be delivered; a retry can't help."""


class DeliveryError(TrackingError):
    """An artifact could not be delivered, or W&B holds something else than was sent."""


class BusyError(TrackingError):
    """Another process is already uploading this run to W&B."""
