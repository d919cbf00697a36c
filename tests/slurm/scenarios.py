"""What befalls the jobs, from submission to end; test_jobs.py says what must have come of it."""

from __future__ import annotations

import getpass
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.slurm.jobs import (
    PACE_SECONDS,
    ROOT,
    TRAINING,
    Job,
    environment,
    kill_node,
    silence_node,
    slurm,
    start_node,
    submit,
    wait_for,
)
from tests.slurm.task import PACE_VARIABLE
from tests.support.parity import as_flags
from tests.support.wandb_server import WandbServer

AT_ONCE = 3
TWO_NODES = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
TWO_GPUS = ("--gpus-per-node=2", "--cpus-per-task=1", "--time=10")
ONE_CPU = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
PACED = {PACE_VARIABLE: str(PACE_SECONDS)}
SHORT = {"max_steps": 12, "eval_strategy": "no", "save_steps": 4}
ZERO2 = "launch_configs/zero2.yaml"


@dataclass
class Scenarios:
    """All that is run, several at once; `result` waits for one. Each has a W&B project of its own."""

    folder: Path
    server: WandbServer
    _running: dict[str, Future[Any]] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(AT_ONCE))

    def start(self) -> None:
        # The longest first: one of them mostly waits for its time limit.
        for act in (
            self.signal_before_the_time_limit,
            self.failed_node,
            self.requeued_and_finished,
            self.reference_of_two,
            self.own_time_limit,
            self.reference_of_one,
            self.surviving_rank,
            self.terminated_offline,
            self.array,
            self.zero_reference,
            self.zero,
            self.raising,
            self.bounded,
            self.cancelled,
            self.unequal,
            self.at_a_terminal,
        ):
            self._running[act.__name__] = self._pool.submit(act)

    def result(self, act: Callable[[], Any]) -> Any:
        return self._running[act.__name__].result()

    def stop(self) -> None:
        """The jobs of a test that failed too."""
        slurm("scancel", f"--user={getpass.getuser()}")
        self._pool.shutdown(cancel_futures=True)

    # Without SLURM

    def reference_of_two(self) -> Path:
        return self._without_slurm("reference_of_two", "launch_configs/ddp.yaml", 2)

    def reference_of_one(self) -> Path:
        return self._without_slurm("reference_of_one", "launch_configs/single.yaml", 1)

    def zero_reference(self) -> Path:
        return self._without_slurm("zero_reference", ZERO2, 2)

    def _without_slurm(self, name: str, config: str, processes: int) -> Path:
        folder = self.folder / name
        folder.mkdir()
        command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={ROOT / config}"]
        command += [f"--num_processes={processes}", "--main_process_port=0", str(ROOT / "harness" / "train.py")]
        command += as_flags({**TRAINING, "output_dir": folder / "run"})
        variables = environment(folder, **self._online(name))
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-4000:]
        return folder / "run"

    def _online(self, project: str) -> dict[str, str]:
        return {**self.server.environment(), "WANDB_PROJECT": project}

    # With it

    def submit(self, name: str, script: str, options: tuple[str, ...], **more: Mapping[str, Any]) -> Job:
        variables = {**self._online(name), **more.pop("variables", {})}
        return submit(self.folder / name, script, *options, variables=variables, **more)

    def requeued_and_finished(self) -> Job:
        """`scontrol requeue` while it trains, and again when it has finished."""
        job = self.submit("requeued_and_finished", "multi_node", TWO_NODES, variables=PACED)
        job.reach(27)
        slurm("scontrol", "requeue", job.id)
        job.requeued()
        job.ended("COMPLETED")
        slurm("scontrol", "requeue", job.id)
        job.requeued(2)
        job.ended("COMPLETED")
        return job

    def signal_before_the_time_limit(self) -> Job:
        """--signal=USR1@60 with a limit of two minutes, of which the harness itself takes no notice."""
        options = (*TWO_NODES[:-1], "--time=2", "--signal=USR1@60")
        flags = {"time_limit_margin_seconds": 0}
        name = "signal_before_the_time_limit"
        job = self.submit(name, "multi_node", options, variables=PACED, flags=flags)
        job.requeued()
        job.give_time()
        job.ended("COMPLETED")
        return job

    def own_time_limit(self) -> Job:
        """A limit of two minutes and no signal: the harness asks SLURM for the time that is left."""
        options = (*TWO_GPUS[:-1], "--time=2", "--signal=B:CONT@1")
        flags = {"time_limit_margin_seconds": 50}
        job = self.submit("own_time_limit", "single_node", options, variables=PACED, flags=flags)
        job.requeued()
        job.give_time()
        job.ended("COMPLETED")
        return job

    def terminated_offline(self) -> Job:
        """`scancel --signal=TERM`, offline; the rows go to the server afterwards."""
        name = "terminated_offline"
        variables = {**PACED, "WANDB_MODE": "offline"}
        job = self.submit(name, "single_node", TWO_GPUS, variables=variables)
        job.reach(27)
        slurm("scancel", "--signal=TERM", job.id)
        job.requeued()
        job.ended("COMPLETED")
        folders = sorted(str(path) for path in (job.output_dir / "wandb").glob("offline-run-*"))
        command = [sys.executable, "-m", "wandb", "sync", *folders]
        variables = environment(job.folder, **self._online(name))
        done = subprocess.run(command, cwd=job.folder, env=variables, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        return job

    def failed_node(self) -> Job:
        """The second of two nodes is gone, with all that ran there; it comes back later."""
        job = self.submit("failed_node", "multi_node", (*TWO_NODES, "--partition=failing"), variables=PACED)
        job.reach(33)
        kill_node("n4", job)
        job.requeued()
        start_node("n4")
        job.ended("COMPLETED")
        return job

    def surviving_rank(self) -> tuple[Job, int]:
        """The node of a job is out of reach: its process makes so many steps beside the job's next attempt."""
        self.result(self.failed_node)  # it needs those nodes
        options = (*ONE_CPU, "--partition=failing")
        job = self.submit("surviving_rank", "single_node", options, variables=PACED)
        job.reach(33)
        node = job.field("NodeList")
        silence_node(node)
        job.requeued()
        before = job.steps(attempt=0)
        job.reach(1, attempt=1)
        steps_beside = job.steps(attempt=0) - before
        job.ended("COMPLETED")
        wait_for(lambda: not job.processes(SLURMD_NODENAME=node), "the end of the survivor")
        start_node(node)
        return job, steps_beside

    def array(self) -> list[Job]:
        job = self.submit("array", "array", ONE_CPU, flags=SHORT)
        tasks = [Job(f"{job.id}_{i}", job.folder) for i in range(3)]
        for task in tasks:
            task.ended("COMPLETED")
        return tasks

    def zero(self) -> Job:
        variables = {"LAUNCH_CONFIG": str(ROOT / ZERO2)}
        job = self.submit("zero", "multi_node", TWO_NODES, variables=variables)
        job.ended("COMPLETED")
        return job

    def raising(self) -> Job:
        job = self.submit("raising", "single_node", ONE_CPU, flags={**SHORT, "task_args": {"fails_at": 6}})
        job.ended("FAILED")
        return job

    def bounded(self) -> Job:
        job = self.submit("bounded", "single_node", ONE_CPU, variables={**PACED, "MAX_REQUEUES": "0"})
        job.reach(5)
        slurm("scancel", "--signal=USR1", job.id)
        job.ended("FAILED")
        return job

    def cancelled(self) -> Job:
        job = self.submit("cancelled", "single_node", ONE_CPU, variables=PACED)
        job.reach(5)
        slurm("scancel", job.id)
        job.ended("CANCELLED")
        wait_for(lambda: not job.processes(), "the end of its processes")
        return job

    def at_a_terminal(self) -> subprocess.CompletedProcess[str]:
        """debug.sbatch in an allocation."""
        folder = self.folder / "at_a_terminal"
        folder.mkdir()
        command = ["salloc", *ONE_CPU, "bash", str(ROOT / "slurm" / "debug.sbatch")]
        command += as_flags({**TRAINING, **SHORT, "max_steps": 2, "report_to": "none"})
        return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=200)

    def unequal(self) -> Job:
        options = ("--gpus-per-node=0", "--gpus=3", "--nodes=2", "--cpus-per-task=1", "--time=10")
        job = self.submit("unequal", "multi_node", options)
        job.ended("FAILED")
        return job
