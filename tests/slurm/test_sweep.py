"""An array of workers on one study: a node fails, and each trial is trained once all the same."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT, TRAINING, Job, environment, kill_node, start_node, wait_for
from tests.slurm.task import PACE_VARIABLE
from tests.support.parity import as_flags
from tests.sweep.sweeping import attempts_of, run_of, states_of, steps_of, write

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(450)]
STEPS = 24
# A node has room for two of the three.
OPTIONS = ["--array=0-2", "--partition=failing", "--gpus-per-node=0", "--cpus-per-task=200", "--time=10"]


def node_of(folder: Path, number: int) -> str:
    """The node on which a trial is trained."""
    pid = attempts_of(folder, number)[-1]["pid"]
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (found,) = [each.partition(b"=")[2].decode() for each in variables if each.startswith(b"SLURMD_NODENAME=")]
    return found


def test_three_workers_share_a_study_and_a_failed_node_costs_no_trial(tmp_path: Path) -> None:
    rates = {"learning_rate": {"values": [1e-4, 3e-4, 1e-3, 3e-3]}}
    write(tmp_path, method="grid", parameters=rates)
    changes = {"max_steps": STEPS, "logging_steps": 1, "eval_steps": 8, "save_steps": 4, "report_to": "none"}
    flags = {name: value for name, value in {**TRAINING, **changes}.items() if name != "learning_rate"}
    command = ["sbatch", "--parsable", *OPTIONS, str(ROOT / "slurm" / "array.sbatch"), "sweep.yaml", "--study=s", "--"]
    variables = environment(tmp_path, **{PACE_VARIABLE: "0.5"})
    done = subprocess.run(
        [*command, *as_flags(flags)], cwd=tmp_path, env=variables, check=True, capture_output=True, text=True
    )
    tasks = [Job(f"{done.stdout.strip()}_{i}", tmp_path) for i in range(3)]
    wait_for(lambda: all(6 in steps_of(run_of(tmp_path, number)) for number in range(3)), "three trials")
    node = node_of(tmp_path, 1)
    kill_node(node, tasks[0])
    wait_for(lambda: len(attempts_of(tmp_path, 1)) == 2, "trial 1 again")
    start_node(node)
    for task in tasks:
        task.ended("COMPLETED")
    assert max(task.restarts for task in tasks) == 1
    assert states_of(tmp_path) == ["COMPLETE"] * 4
    assert [steps_of(run_of(tmp_path, number)) for number in range(4)] == [list(range(1, STEPS + 1))] * 4
