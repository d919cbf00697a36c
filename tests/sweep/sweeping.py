"""`harness sweep` as a process, on the tiny task, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from harness.sweep.recall import recalled
from harness.sweep.study import Study
from tests.support.faulty_training import environment
from tests.support.forking import fork
from tests.support.parity import as_flags
from tests.support.wandb_server import WandbServer

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 240.0
# The trainings of a sweep are forked from the process that has the libraries loaded, as those of other tests.
FORKED = """--launcher=sh -c 'exec "${PYTHON_EXEC:-python}" "$@"' sh"""
FLAGS: dict[str, Any] = {
    "task": "tests.support.tasks.parity_task:build",
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "max_steps": 12,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_steps": 4,
    "save_total_limit": 1,
    "use_cpu": True,
    "report_to": "none",
}
LOSS = {"name": "eval/loss", "goal": "minimize"}


def write(folder: Path, **spec: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"metric": LOSS, **spec}), encoding="utf-8")
    return path


def paced(folder: Path, seconds: float) -> dict[str, Any]:
    """Flags of trials that take so long for a step."""
    args = {"times": str(folder / "times"), "seconds": seconds}
    return {"task": "tests.support.tasks.faulty_task:build", "task_args": args}


class Sweeping:
    """A sweep in `folder` that has begun; its study is called `s`."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        server: WandbServer | None = None,
        flags: Mapping[str, Any] | None = None,
        launcher: str = FORKED,
        **variables: str,
    ) -> None:
        self.folder = folder
        given = {**FLAGS, **(flags or {})}
        argv = ["-m", "harness", "sweep", str(folder / "sweep.yaml"), "--study=s", launcher, *options, "--"]
        self.argv = [*argv, *as_flags({name: value for name, value in given.items() if value is not None})]
        self.variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment(folder, server), **variables}
        with (folder / "out").open("a") as out, (folder / "err").open("a") as err:
            self.process = fork(self.argv, env=self.variables, cwd=folder, out=out, err=err)

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8")

    def ended(self, code: int = 0) -> Sweeping:
        try:
            found = self.process.wait(WAIT_SECONDS)
        finally:
            self.process.kill()
        assert found == code, f"exit code {found}\n{self.out[-3000:]}\n{self.err[-3000:]}"
        return self

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + WAIT_SECONDS
        while not (found := condition()):
            assert self.process.poll() is None, f"it has ended: {self.out[-2000:]}\n{self.err[-2000:]}"
            assert time.monotonic() < end, f"waited for {what}"
            time.sleep(0.05)
        return found

    def workers(self) -> list[int]:
        """The processes of its workers, where it has several."""
        found = []
        for process in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if any(word.startswith("--worker=") for word in process.cmdline()):
                    found.append(process.pid)
        return found


def environment_of(folder: Path, number: int) -> dict[str, str]:
    """What a trial's training has in its environment."""
    pid = attempts_of(folder, number)[-1]["pid"]
    lines = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def run_of(folder: Path, number: int) -> Path:
    return folder / "runs" / "s" / str(number)


def steps_of(run: Path) -> list[int]:
    """The optimizer steps in the rows of a run, each as often as it is there."""
    with contextlib.suppress(FileNotFoundError):
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row["train/global_step"] for row in rows if "train/loss" in row]
    return []


def attempts_of(folder: Path, number: int) -> list[dict[str, Any]]:
    path = folder / "runs" / "s" / "trials" / str(number) / "attempts.json"
    with contextlib.suppress(OSError, ValueError):
        return list(json.loads(path.read_text(encoding="utf-8")))
    return []


def kill_training(folder: Path, number: int) -> None:
    os.kill(attempts_of(folder, number)[-1]["pid"], signal.SIGKILL)


def study_of(folder: Path) -> Study:
    return Study(recalled(str(folder / "runs" / "s"), None))


def states_of(folder: Path) -> list[str]:
    return [trial.state.name for trial in study_of(folder).trials()]
