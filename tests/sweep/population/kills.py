"""
`python -m tests.sweep.population.kills FOLDER N`: train a population, and kill trainings, workers and drivers, N each.

The driver is started again until the population has ended. Then each member's rows are counted, and each is trained
anew by the commands of its replay, alone and undisturbed: its weights must be the same to the bit. Ends with 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[3]
TASK = "tests.support.tasks.faulty_task:build"
KINDS = ("training", "worker", "driver")
SECONDS_FOR_ALL = 3600.0
MOST_STARTS = 200


@dataclass
class Laboratory:
    """A population of a tiny model in a folder; `pace` are the seconds of a step, at least."""

    folder: Path
    size: int = 12
    interval: int = 4
    num_steps: int = 12
    workers: int = 2
    pace: float = 0.2
    flags: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def study(self) -> Path:
        """The folder of the study."""
        return self.folder / "study"

    def prepare(self) -> None:
        """Write the sweep file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "method": "population",
            "metric": {"name": "eval/loss"},
            "parameters": {
                "learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 2e-2},
                "weight_decay": {"values": [0.0, 0.01, 0.1]},
                "max_steps": {"value": self.num_steps},
            },
            "population": {"size": self.size, "perturbation_interval": self.interval},
        }
        (self.folder / "population.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    def environment(self) -> dict[str, str]:
        """The environment of each command: nothing of W&B's or of a launcher's from outside."""
        names = ("WANDB", "RANK", "WORLD_SIZE", "ACCELERATE_", "SLURM_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **self.variables}

    def command(self) -> list[str]:
        """The command of the sweep, the same at each start."""
        given: dict[str, Any] = {
            "task": TASK,
            "task_args": json.dumps({"times": str(self.folder / "times"), "seconds": self.pace}),
            "report_to": "none",
            "use_cpu": True,
            "seed": 42,
            "logging_steps": 1,
            "per_device_train_batch_size": 8,
            "eval_strategy": "steps",
            "eval_steps": self.interval,
            "save_steps": 2,
            "save_total_limit": 2,
            **self.flags,
        }
        flags = [f"--{name}={value}" for name, value in given.items()]
        options = ["--folder", str(self.study), "--workers", str(self.workers)]
        return [*harness("sweep"), str(self.folder / "population.yaml"), *options, "--", *flags]

    def start(self) -> subprocess.Popen[bytes]:
        """Start the driver."""
        with (self.folder / "driver.log").open("ab") as log:
            return subprocess.Popen(
                self.command(), cwd=self.folder, env=self.environment(), stdout=log, stderr=log, start_new_session=True
            )

    def told(self) -> str:
        """Return what all drivers and workers have printed."""
        return (self.folder / "driver.log").read_text(encoding="utf-8", errors="replace")

    def victims(self, kind: str, driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Return the processes of a kind that belong to this population, orphans too."""
        if kind == "driver":
            return [psutil.Process(driver.pid)] if driver.poll() is None else []
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            line = " ".join(words)
            is_worker = "--worker=" in line and str(self.folder / "population.yaml") in words
            is_training = f"--output_dir={self.study}/" in line and "harness.sweep.tied" not in words
            if (is_worker and kind == "worker") or (is_training and kind == "training" and not is_worker):
                found.append(process)
        return found

    def end_all(self, driver: subprocess.Popen[bytes]) -> None:
        """End what is left."""
        for kind in KINDS:
            for process in self.victims(kind, driver):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        driver.wait()

    def record(self) -> dict[str, Any]:
        """Return `population.json`."""
        found: dict[str, Any] = json.loads((self.study / "population.json").read_text(encoding="utf-8"))
        return found

    def rows(self, member: int) -> list[dict[str, Any]]:
        """Return the rows of a member."""
        text = (self.study / str(member) / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def steps(self, member: int) -> list[int]:
        """Return the steps whose loss is in the rows of a member."""
        return [row["train/global_step"] for row in self.rows(member) if "train/loss" in row]

    def shown(self, *options: str) -> str:
        """Return what `harness sweep --show` prints."""
        command = [*harness("sweep"), "--show", str(self.study), *options]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def replay(self, member: int) -> Path:
        """Train a member anew by its commands; returns the folder."""
        script, folder = self.folder / f"replay-{member}.sh", self.folder / f"replay-{member}"
        script.write_text(self.shown("--replay", str(member)), encoding="utf-8")
        with (self.folder / f"replay-{member}.log").open("wb") as log:
            subprocess.run(
                ["sh", str(script), str(folder)],
                cwd=self.folder,
                env=self.environment(),
                stdout=log,
                stderr=log,
                check=True,
            )
        return folder

    def faults(self, members: Sequence[int]) -> Iterator[str]:
        """Yield what is wrong: rows that are doubled or missing, weights that a replay does not come to."""
        for member in range(self.size):
            if (steps := self.steps(member)) != list(range(1, self.num_steps + 1)):
                yield f"member {member} has rows of the steps {steps}"
            numbers = [row["_row"] for row in self.rows(member)]
            if numbers != list(range(len(numbers))):
                yield f"member {member} has the rows {numbers}"
        for member in members:
            ours = load_file(self.study / str(member) / "model.safetensors")
            again = load_file(self.replay(member) / "model.safetensors")
            if ours.keys() != again.keys() or not all(torch.equal(ours[name], again[name]) for name in ours):
                yield f"member {member} is not what its replay comes to"


def harness(command: str) -> list[str]:
    """The words of a command of ours."""
    return [sys.executable, "-m", "harness", command]


@contextmanager
def driven(laboratory: Laboratory) -> Iterator[Driver]:
    """A driver that is started again when it has ended, and ended with all that it started."""
    driver = Driver(laboratory)
    try:
        yield driver
    finally:
        laboratory.end_all(driver.process)


class Driver:
    """The driver of a population, as often as it is started."""

    def __init__(self, laboratory: Laboratory) -> None:
        self.laboratory, self.starts = laboratory, 1
        self.process = laboratory.start()

    def is_done(self) -> bool:
        """Whether the population has ended; a driver that ended before that is started again."""
        code = self.process.poll()
        if code == 0:
            return True
        if code is not None:
            if code == 2 or self.starts >= MOST_STARTS:
                raise AssertionError(f"exit code {code}: {self.laboratory.told()[-3000:]}")
            self.process = self.laboratory.start()
            self.starts += 1
        return False

    def kill(self, kind: str, random_: random.Random) -> bool:
        """Kill one process of a kind; False if there is none now."""
        victims = self.laboratory.victims(kind, self.process)
        with suppress(psutil.NoSuchProcess):
            if victims:
                random_.choice(victims).send_signal(signal.SIGKILL)
                return True
        return False

    def finish(self, seconds: float = SECONDS_FOR_ALL) -> None:
        """Wait for the end of the population."""
        until = time.monotonic() + seconds
        while not self.is_done():
            assert time.monotonic() < until, self.laboratory.told()[-3000:]
            time.sleep(0.1)


def struck(driver: Driver, plan: Sequence[str], random_: random.Random, *, pause: tuple[float, float]) -> int:
    """Kill by the plan, with a pause before each; returns how many kills there were before the population ended."""
    count = 0
    for kind in plan:
        until = time.monotonic() + random_.uniform(*pause)
        while time.monotonic() < until:
            if driver.is_done():
                return count
            time.sleep(0.05)
        while not driver.kill(kind, random_):
            if driver.is_done():
                return count
            time.sleep(0.02)
        count += 1
    return count


def main(argv: list[str] | None = None) -> int:
    """Play the laboratory."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep.population.kills", description=__doc__)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("kills", type=int, help="of trainings, of workers and of drivers: so many each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=12)
    parser.add_argument("--intervals", type=int, default=3)
    asked = parser.parse_args(argv)
    laboratory = Laboratory(asked.folder.absolute(), size=asked.size, num_steps=4 * asked.intervals)
    laboratory.prepare()
    random_ = random.Random(asked.seed)
    plan = [kind for kind in KINDS for _ in range(asked.kills)]
    random_.shuffle(plan)
    began = time.monotonic()
    with driven(laboratory) as driver:
        count = struck(driver, plan, random_, pause=(1.0, 12.0))
        driver.finish()
    took = time.monotonic() - began
    print(f"{count} kills of {len(plan)}, {driver.starts} drivers, {took:.0f} s; now the replays", flush=True)
    made = sum(len(laboratory.steps(member)) for member in range(laboratory.size))
    print(f"{made} steps in the rows, {laboratory.size * laboratory.num_steps} planned", flush=True)
    faults = [*laboratory.faults(range(laboratory.size))]
    for fault in faults:
        print(fault)
    print("nothing differs" if not faults else f"{len(faults)} faults")
    return 1 if faults or count < len(plan) else 0


if __name__ == "__main__":
    sys.exit(main())
