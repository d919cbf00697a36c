"""Trainings in processes of their own with a W&B server on this machine, which something happens to meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.train import main
from tests.support.forking import fork, start
from tests.support.parity import TRAINING, as_flags, reset
from tests.support.wandb import artifact_processes as processes
from tests.support.wandb_server import ArtifactRecord, WandbServer

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "harness" / "train.py")
TASK = "tests.support.tasks.faulty_task:build"
STEPS = 30
SAVES = 10
WAIT_SECONDS = 150.0


def environment(folder: Path, server: WandbServer | None, **variables: str) -> dict[str, str]:
    """The server's credentials or none, no settings and no home but `folder`'s. Rows are sent each second."""
    return processes.environment(folder, server, **{"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1", **variables})


class Training:
    """
    The tiny training under `folder`: 30 steps of `pace` seconds at least, a checkpoint every 10. It has begun.

    `arguments` are further flags, None takes one away, `variables` the environment's. Its run is called like `folder`.
    With a `command` it is a start like a user's; without one the libraries are loaded already.
    """

    device = "cpu"

    def __init__(
        self,
        folder: Path,
        server: WandbServer | None,
        *,
        pace: float = 0.0,
        command: tuple[str, ...] | None = None,
        task: Mapping[str, Any] | None = None,
        builder: str = TASK,
        variables: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        device: str = "cpu",
        **arguments: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.server, self.output_dir, self.run_id = folder, server, folder / "out", folder.name
        self.times, self.pace, self.device = folder / "times", pace, device
        wandb = {"wandb_run_id": self.run_id, "wandb_log_model": "checkpoint"}
        flags = self._flags(task or {}, {"task": builder, **wandb, **arguments})
        self.variables = environment(folder, server, **(variables or {}))
        with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
            given = {"env": self.variables, "cwd": cwd or folder, "out": out, "err": err}
            self.process = start([*command, *flags], **given) if command else fork([SCRIPT, *flags], **given)

    @classmethod
    def here(cls, folder: Path, *, device: str = "cpu", **arguments: Any) -> Training:
        """The same in this process, to its end, without W&B."""
        folder.mkdir()
        self = cls.__new__(cls)
        self.folder, self.output_dir, self.times, self.pace = folder, folder / "out", folder / "times", 0.0
        self.device = device
        reset()
        assert main(self._flags({}, {"report_to": "none", **arguments})) == 0
        return self

    @classmethod
    def flags_for(cls, folder: Path, **arguments: Any) -> list[str]:
        """What the training is given, for somebody else to start it."""
        self = cls.__new__(cls)
        self.output_dir, self.times, self.pace = folder / "out", folder / "times", 0.0
        return self._flags({}, arguments)

    def _flags(self, task: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
        checkpoints = {"save_strategy": "steps", "save_steps": SAVES, "output_dir": self.output_dir}
        args = {"times": str(self.times), "seconds": self.pace, **task}
        flags = {**TRAINING, **checkpoints, "task": TASK, "task_args": args, **arguments}
        flags["use_cpu"] = self.device == "cpu"
        return [*as_flags({name: value for name, value in flags.items() if value is not None})]

    @property
    def out(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")

    @property
    def began_steps(self) -> list[float]:
        """When each step drew its batch, a batch ahead."""
        return [float(line) for line in self.times.read_text().splitlines()] if self.times.exists() else []

    @property
    def opening_seconds(self) -> float:
        """From the built model to the first step: W&B's run is opened in between."""
        return self.began_steps[0] - float((self.folder / "built").read_text())

    @property
    def closing_seconds(self) -> float:
        """From the last step to the end of the process."""
        return self._ended - self.began_steps[-1]

    @property
    def training_seconds(self) -> float:
        times = self.began_steps
        return times[-1] - times[0]

    @property
    def longest_step(self) -> float:
        return max(after - before for before, after in itertools.pairwise(self.began_steps))

    def reach(self, step: int) -> None:
        """Wait until the training is in a step."""
        end = time.monotonic() + WAIT_SECONDS
        while len(self.began_steps) < step:
            assert self.process.poll() is None, self.err[-3000:]
            assert time.monotonic() < end, f"step {step} was not reached"
            time.sleep(0.02)

    def ended(self, code: int = 0) -> Training:
        """Wait for the end, which must have this exit code."""
        try:
            found = self.process.wait(WAIT_SECONDS)
        finally:
            self._ended = time.monotonic()
            with contextlib.suppress(ProcessLookupError):  # a launcher's processes, and wandb's
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        assert found == code, f"exit code {found}\n{self.out[-2000:]}\n{self.err[-4000:]}"
        return self

    @property
    def report(self) -> list[str]:
        """What the table at the end says of W&B."""
        return [line.partition(" ")[2].strip() for line in self.out.splitlines() if line.startswith("W&B ")]

    def type_in(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a command that the user was told."""
        line = re.sub(r"\b(harness|wandb) (sync|link)\b", rf"{sys.executable} -m \1 \2", line)
        return subprocess.run(  # noqa: S602 - as the user would type it
            line,
            shell=True,
            env={**self.variables, **(self.server.environment() if self.server else {})},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )


def committed(server: WandbServer) -> Iterator[ArtifactRecord]:
    return (found for found in server.artifacts() if found.state == "COMMITTED")
