"""Jobs on the cluster of setup_cluster.sh: submit them by the shipped scripts, wait, look, kill what they run on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.attempt import processes_of, send
from tests.faults.plan import FOLDER_VARIABLE
from tests.support.parity import as_flags

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "tests" / "slurm" / "setup_cluster.sh"
CLUSTER = Path(os.environ.get("HARNESS_SLURM_DIR") or f"/tmp/harness-slurm-{os.getuid()}")  # noqa: S108 - as SETUP has it
NOT_INHERITED = ("WANDB_", "SLURM_", "ACCELERATE_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
# Two processes of 4 samples, 117 in all: 15 steps an epoch. The model has dropout.
TRAINING: dict[str, Any] = {
    "task": "tests.slurm.task:build",
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "max_steps": 160,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 40,
    "save_steps": 20,
    "save_total_limit": 2,
    "ddp_find_unused_parameters": False,
}
PACE_SECONDS = 0.5
WAIT_SECONDS = 300.0
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Of a job, or of the same command without one."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    return {
        **inherited,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HARNESS_DIR": str(ROOT),
        "SLURM_CONF": str(CLUSTER / "slurm.conf"),
        "WANDB_SILENT": "true",
        FOLDER_VARIABLE: str(folder),
        **variables,
    }


def slurm(*command: str) -> str:
    variables = {**os.environ, "SLURM_CONF": str(CLUSTER / "slurm.conf")}
    return subprocess.run(command, env=variables, check=True, capture_output=True, text=True, timeout=30).stdout


def wait_for(condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array, that was submitted in `folder`."""

    id: str
    folder: Path

    @property
    def output_dir(self) -> Path:
        return self.folder / "runs" / f"job-{self.id}"

    @property
    def output(self) -> str:
        return (self.folder / f"slurm-{self.id}.out").read_text(encoding="utf-8", errors="replace")

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S*)", slurm("scontrol", "show", "job", self.id))
        assert found
        return found[1]

    @property
    def restarts(self) -> int:
        return int(self.field("Restarts"))

    def steps(self, attempt: int = 0) -> int:
        """How many batches rank zero has drawn in an attempt."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "steps").read_text(encoding="utf-8").split().count(str(attempt))
        return 0

    def reach(self, steps: int, attempt: int = 0) -> None:
        def is_there_or_ended() -> bool:
            return self.steps(attempt) >= steps or self.field("JobState") in ENDED

        wait_for(is_there_or_ended, f"step {steps} of job {self.id}")
        assert self.steps(attempt) >= steps, self.output[-4000:]

    def requeued(self, times: int = 1) -> None:
        wait_for(lambda: self.restarts >= times or self.field("JobState") in ENDED, f"a requeue of job {self.id}")
        assert self.restarts == times, self.output[-4000:]

    def give_time(self) -> None:
        """The next attempt has as long as it needs."""
        slurm("scontrol", "update", f"job={self.id}", "TimeLimit=10")

    def ended(self, state: str) -> None:
        wait_for(lambda: self.field("JobState") in ENDED, f"the end of job {self.id}")
        assert self.field("JobState") == state, self.output[-4000:]

    def processes(self, **variables: str) -> list[int]:
        """Those of the training with these values in their environment."""
        wanted = [f"{name}={value}".encode() for name, value in variables.items()]
        found = []
        for number in processes_of(self.folder):
            with contextlib.suppress(OSError):
                present = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
                if all(each in present for each in wanted):
                    found.append(number)
        return found


def submit(
    folder: Path, script: str, *options: str, variables: Mapping[str, str], flags: Mapping[str, Any] | None = None
) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["sbatch", "--parsable", *options, str(ROOT / "slurm" / f"{script}.sbatch")]
    command += as_flags({**TRAINING, **(flags or {})})
    done = subprocess.run(
        command, cwd=folder, env=environment(folder, **variables), check=True, capture_output=True, text=True
    )
    return Job(done.stdout.strip(), folder)


def silence_node(name: str) -> None:
    """What a cut network does: SLURM hears no more of the node, what runs there goes on."""
    send([int((CLUSTER / f"slurmd-{name}.pid").read_text())], signal.SIGKILL)


def kill_node(name: str, job: Job) -> None:
    """What a power cut does: the daemons of the node are gone, and what ran there."""
    silence_node(name)
    there = job.processes(SLURMD_NODENAME=name)
    send([step for each in there if (step := _step_daemon_above(each))], signal.SIGKILL)
    send(there, signal.SIGKILL)


def start_node(name: str) -> None:
    variables = {**os.environ, "HARNESS_SLURM_DIR": str(CLUSTER)}
    subprocess.run([SETUP, "node", name], env=variables, check=True, timeout=60)


def _step_daemon_above(number: int) -> int | None:
    with contextlib.suppress(OSError):
        parent = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
        if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
            return parent
    return None
