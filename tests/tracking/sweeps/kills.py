"""
Kill W&B's agent and count: `python -m tests.tracking.sweeps.kills FOLDER [KILLS]`.

It is a grid of four runs on the test server. SIGKILL comes to the agent, KILLS times, at moments drawn from a seed; its
run saves and ends by itself, and another agent is started, to which W&B gives that run again. Then each run has to be
finished, each of its rows to be in W&B once, and its model to be that of the plain run of its flags, to the last bit.
The exit code is 1 if anything differs.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness.files import digest_of
from tests.support.wandb.sweeps import Sweep, end, flags, script, steps_of
from tests.support.wandb_server import RunRecord, WandbServer

RATES = (1e-4, 1e-3, 3e-3, 1e-2)
STEPS = 30
SECONDS_ALIVE = (0.5, 5.0)  # behind the first step of an agent's run


def play(folder: Path, server: WandbServer, kills: int, *, seed: int = 0) -> list[str]:
    """Play one sweep to its end; returns what is wrong with what it leaves."""
    rng = random.Random(seed)
    command = script(*flags(folder, pace=0.3, learning_rate=None))
    with Sweep(folder, server, {"learning_rate": {"values": list(RATES)}}, command) as sweep:
        for number in range(kills):
            agent, before = sweep.agent(), rows_of(sweep)
            sweep.wait(lambda before=before: rows_of(sweep) > before, "a further step")
            time.sleep(rng.uniform(*SECONDS_ALIVE))
            if agent.poll() is not None:
                return [f"all runs had ended after {number} kills: give fewer"]
            end(agent, signal.SIGKILL)
            agent.wait()
            sweep.wait(lambda: not any(sweep.processes(run.id) for run in sweep.runs), "the orphans have ended")
        code = sweep.ended(sweep.agent())
        wrong = [] if code == 0 else [f"the last agent has ended with {code}"]
        if len(sweep.runs) != len(RATES):
            wrong.append(f"{len(sweep.runs)} runs for {len(RATES)} rates")
        return [*wrong, *(fault for run in sweep.runs for fault in wrong_with(sweep, run))]


def rows_of(sweep: Sweep) -> int:
    """How many rows of steps all runs have so far."""
    return sum(len(sweep.steps(run.id)) for run in sweep.runs)


def wrong_with(sweep: Sweep, run: RunRecord) -> list[str]:
    """Return what is wrong with a run: its state, its rows, its model."""
    folder, plain = sweep.output_dir(run.id), sweep.folder / "plain" / run.id
    faults = [] if (run.state, run.exit_code) == ("finished", 0) else [f"{run.id} is {run.state}, {run.exit_code}"]
    if (steps := steps_of(run)) != [*range(1, STEPS + 1)]:
        faults.append(f"{run.id} has the steps {steps}")
    again = ["--config", str(folder / "harness_config.yaml"), "--report_to", "none", "--output_dir", str(plain)]
    command = [sys.executable, "-m", "harness", "train", *again]
    subprocess.run(command, env=sweep.variables, cwd=sweep.folder, check=True, capture_output=True)
    if digest_of(folder / "model.safetensors") != digest_of(plain / "model.safetensors"):
        faults.append(f"{run.id} has another model than its plain run")
    return faults


def main(folder: Path, kills: int = 10) -> int:
    """Play and tell; returns the exit code."""
    began = time.monotonic()
    folder.mkdir(parents=True)
    with WandbServer(folder / "server") as server:
        wrong = play(folder / "agents", server, kills)
    print("\n".join(wrong) or "nothing differs", f"\n{kills} kills, {time.monotonic() - began:.0f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
