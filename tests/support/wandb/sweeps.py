"""Sweeps of W&B on the test server: `wandb sweep` and `wandb agent`, and what their runs have left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.support.faulty_training import SCRIPT, Training, environment
from tests.support.wandb_server import RunRecord, WandbServer

# The command `wandb`, with an agent that asks the server twice a second instead of each five.
IMPATIENT = """
from wandb import wandb_agent
from wandb.cli.cli import cli
wandb_agent.Agent.POLL_INTERVAL = 0.5
cli(prog_name="wandb")
"""
WAIT_SECONDS = 400.0  # for some starts of a launcher, beside other work
PYTHON = ("${env}", "${interpreter}")


class Sweep:
    """
    A grid of W&B's over tiny trainings, made by `wandb sweep`, with agents in `folder`. A context manager.

    It ends all that is left of its agents and runs. Its project is called like the folder.
    """

    def __init__(
        self, folder: Path, server: WandbServer, parameters: dict[str, Any], command: Sequence[str], **variables: str
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self.server = folder, server
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.variables = environment(folder, server, PATH=path, OMP_NUM_THREADS="1", **variables)
        self.program = folder / "bin" / "wandb"  # by whose name an agent is known
        self.program.parent.mkdir()
        self.program.write_text(IMPATIENT)
        config = {"method": "grid", "parameters": parameters, "command": list(command), "project": folder.name}
        (folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        said = self._wandb("sweep", "sweep.yaml")
        (self.path,) = re.findall(r"wandb agent (\S+)", re.sub(r"\x1b\[\d*m", "", said))
        self.id = self.path.rpartition("/")[2]
        self.agents: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        for each in [*psutil.process_iter()]:
            with contextlib.suppress(psutil.Error):
                if each.environ().get("WANDB_SWEEP_ID") == self.id or each.pid in [a.pid for a in self.agents]:
                    each.kill()
        for agent in self.agents:
            agent.wait()

    def _wandb(self, *argv: str) -> str:
        command = [sys.executable, "-m", "wandb", *argv]
        given = {"env": self.variables, "cwd": self.folder, "timeout": WAIT_SECONDS, "text": True}
        done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL, **given)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr
        return str(done.stdout + done.stderr)

    def cancel(self) -> None:
        self._wandb("sweep", "--cancel", self.path)

    def agent(self, *options: str) -> subprocess.Popen[bytes]:
        """Start an agent."""
        with (self.folder / f"agent-{len(self.agents)}").open("wb") as out:
            command = [sys.executable, str(self.program), "agent", *options, self.path]
            given = {"env": self.variables, "cwd": self.folder, "stdin": subprocess.DEVNULL}
            self.agents.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **given))  # type: ignore[call-overload]
        return self.agents[-1]

    @property
    def said(self) -> str:
        """All that the agents and their runs have printed."""
        return "".join(
            (self.folder / f"agent-{i}").read_text(encoding="utf-8", errors="replace") for i in range(len(self.agents))
        )

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until it is true; returns what it has returned."""
        end = time.monotonic() + WAIT_SECONDS
        while not (found := condition()):
            assert time.monotonic() < end, f"not so within {WAIT_SECONDS} s: {what}\n{self.said[-6000:]}"
            time.sleep(0.05)
        return found

    def ended(self, agent: subprocess.Popen[bytes]) -> int:
        return int(self.wait(lambda: None if agent.poll() is None else [agent.poll()], "the agent has ended")[0])

    @property
    def runs(self) -> list[RunRecord]:
        return [run for run in self.server.runs() if run.sweep == self.id]

    def output_dir(self, run_id: str) -> Path:
        return self.folder / "runs" / f"sweep-{self.id}" / run_id

    def steps(self, run_id: str) -> list[int]:
        """The steps of the training's rows in its journal."""
        path = self.output_dir(run_id) / "metrics.jsonl"
        if not path.exists():
            return []
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        return [row["train/global_step"] for row in rows if "train/loss" in row]

    def reach(self, number: int, step: int) -> str:
        """Wait until run `number`, counted from 0, has reached a step; returns its id."""

        def reached() -> str | None:
            runs = self.runs[number : number + 1]
            return runs[0].id if runs and max(self.steps(runs[0].id), default=0) >= step else None

        return str(self.wait(reached, f"run {number} is at step {step}"))

    def processes(self, run_id: str) -> list[psutil.Process]:
        """Those of a run: launcher, ranks, and W&B's."""
        found = []
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if each.environ().get("WANDB_RUN_ID") == run_id and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(each)
        return [each for each in found if each.pid not in [agent.pid for agent in self.agents]]


def flags(folder: Path, *, pace: float = 0.0, **arguments: Any) -> list[str]:
    """The tiny training's, `pace` seconds a step, without a folder."""
    given = {"task_args": {"times": str(folder / "times"), "seconds": pace}, **arguments}
    return [word for word in Training.flags_for(folder, **given) if not word.startswith("--output_dir")]


def script(*words: str) -> list[str]:
    return [*PYTHON, SCRIPT, "${args}", *words]


def steps_of(run: RunRecord) -> list[int]:
    """The steps of the training's rows that W&B has."""
    return [row["train/global_step"] for row in run.rows if "train/loss" in row]


def end(agent: subprocess.Popen[bytes], signum: int = signal.SIGTERM) -> None:
    agent.send_signal(signum)
