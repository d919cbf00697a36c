"""An attempt of a training: its processes, its progress, and how to end it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.plan import FOLDER_VARIABLE

SILENCE_SECONDS = 120.0
POLL_SECONDS = 0.002
COMMITTED = re.compile(r"checkpoint-(\d+)")
# As containers are: process numbers of its own, and a first process that is not the training.
CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", '"$@"; exit $?', "sh")


class HungError(Exception):
    """An attempt neither ended nor reached the awaited point."""


def processes_of(folder: Path) -> list[int]:
    """All processes that were started for a case, or below a folder of cases; also those whose parents are gone."""
    mark = f"{FOLDER_VARIABLE}={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            variables = (entry / "environ").read_bytes().split(b"\0")
            if any(each == mark or each.startswith(mark + b"/") for each in variables):
                found.append(int(entry.name))
    return found


def end_processes_of(folder: Path) -> None:
    """Send SIGKILL to all until none is left: one of them may be starting another."""
    while found := [number for number in processes_of(folder) if not _is_dead(number)]:
        send(found, signal.SIGKILL)
        time.sleep(0.01)


def send(numbers: list[int], what: signal.Signals) -> None:
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, what)


def _is_dead(number: int) -> bool:
    return _status(number)[0] in "ZX"


def committed_steps(output_dir: Path) -> list[int]:
    """The steps of the folders checkpoint-N, in order."""
    with contextlib.suppress(OSError):
        names = [COMMITTED.fullmatch(path.name) for path in output_dir.iterdir()]
        return sorted(int(name[1]) for name in names if name)
    return []


@dataclass
class Attempt:
    """
    A process that has been started in the folder of a case. `number` counts the attempts of a case from 1.

    `reader` stands between its standard output and the file, as a pager does.
    """

    folder: Path
    output_dir: Path
    process: subprocess.Popen[bytes]
    number: int
    first_step: int
    began_at: float
    ended_at: float = 0.0
    reader: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls,
        command: list[str],
        variables: dict[str, str],
        folder: Path,
        output_dir: Path,
        number: int,
        *,
        is_read: bool = False,
    ) -> Attempt:
        for name in ("built", "steps", "evaluations"):
            (folder / name).unlink(missing_ok=True)
        steps = committed_steps(output_dir)
        variables = {**variables, FOLDER_VARIABLE: str(folder)}
        with (folder / f"out-{number}").open("wb") as out, (folder / f"err-{number}").open("wb") as err:
            reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out, env=variables) if is_read else None
            began_at = time.time()
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=reader.stdin if reader else out,
                stderr=err,
                start_new_session=True,
            )
        if reader and reader.stdin:
            reader.stdin.close()
        return cls(folder, output_dir, process, number, steps[-1] if steps else 0, began_at, reader=reader)

    def lines(self, name: str) -> list[float]:
        """The times that the task wrote into a file of its own in this attempt."""
        try:
            return [float(line) for line in (self.folder / name).read_text().splitlines()]
        except (FileNotFoundError, ValueError):  # ValueError: a line that is being written
            return []

    @property
    def step(self) -> int:
        """The step that it is in, approximately."""
        return self.first_step + len(self.lines("steps"))

    @property
    def is_built(self) -> bool:
        return (self.folder / "built").exists()

    def text(self, name: str) -> str:
        return (self.folder / f"{name}-{self.number}").read_text(encoding="utf-8", errors="replace")

    def wait_for(self, condition: Callable[[], bool], seconds: float = SILENCE_SECONDS) -> bool:
        """Whether the condition held before the end of this attempt. Raises HungError."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                raise HungError(f"attempt {self.number} hung at step {self.step}")
            time.sleep(POLL_SECONDS)
        return True

    def sleep(self, seconds: float) -> bool:
        """Sleep, at most to the end of the attempt; returns whether it is still running."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(seconds, 0.0))
        return self.process.poll() is None

    def end(self) -> int:
        """Wait for the end; returns the exit code. Raises HungError."""
        try:
            code = self.process.wait(SILENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise HungError(f"attempt {self.number} did not end") from None
        self.ended_at = time.time()
        if self.reader is not None:
            self.reader.wait(SILENCE_SECONDS)
        return code

    # Who it is made of

    def everybody(self) -> list[int]:
        return processes_of(self.folder)

    def ranks(self) -> list[int]:
        """The training processes in the order of their ranks; of one process the script. May be empty at the start."""
        found = {rank: number for number, rank in self._ranks() if rank is not None}
        return [found[rank] for rank in sorted(found)] or ([self.script] if not self._is_launched else [])

    @property
    def script(self) -> int:
        """The process that the command line names: in a container not the one that was started."""
        return (self._layers() or [self.process.pid])[-1]

    def reached_by_terminal(self) -> list[int]:
        """All that Ctrl-C, or a terminal that is closed, sends a signal to."""
        around = self._layers()[:-1]
        return [each for each in self.everybody() if each not in around and _group(each) == self.process.pid]

    def _layers(self) -> list[int]:
        """In a container what was started, its first process, and the script; [] elsewhere or at its start."""
        if CONTAINER[0] not in self.process.args:
            return []
        parents = {number: _parent(number) for number in self.everybody()}
        found = [self.process.pid]
        for _ in range(2):
            found += [number for number, parent in parents.items() if parent == found[-1]][:1]
        return found if len(found) == 3 else []

    @property
    def _is_launched(self) -> bool:
        return "accelerate.commands.launch" in self.process.args

    def _ranks(self) -> Iterator[tuple[int, str | None]]:
        if not self._is_launched:
            return
        for number in self.everybody():
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
                rank = next((each[5:].decode() for each in variables if each.startswith(b"RANK=")), None)
                if rank is not None and _parent(number) == self.script:
                    yield number, rank

    def cores(self) -> list[int]:
        """wandb-core, W&B's service."""
        found = []
        for number in self.everybody():
            with contextlib.suppress(OSError):
                if b"wandb-core" in Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")[0]:
                    found.append(number)
        return found


def _parent(number: int) -> int:
    return int(_status(number)[1])


def _group(number: int) -> int:
    return int(_status(number)[2])


def _status(number: int) -> list[str]:
    """What /proc says of a process, from its state on; zeros if it has ended."""
    try:
        status = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ["X", "0", "0"]
    return status.rpartition(")")[2].split()
