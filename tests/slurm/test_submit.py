"""`harness submit` on a real SLURM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.jobs import TRAINING, Job, environment
from tests.support.parity import as_flags

pytestmark = pytest.mark.slurm


def test_a_job_is_checked_submitted_and_trains(tmp_path: Path) -> None:
    options = ["--gpus-per-node", "0", "--time", "5", "--sbatch=--cpus-per-task=1", "--no-internet"]
    flags = as_flags({**TRAINING, "max_steps": 3, "eval_strategy": "no"})
    done = subprocess.run(
        [sys.executable, "-m", "harness", "submit", *options, *flags],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Submitted job ")]
    job = Job(line.removeprefix("Submitted job ").rstrip("."), tmp_path)
    job.ended("COMPLETED")
    assert list((job.output_dir / "wandb").glob("offline-run-*"))
    assert f"tail -F slurm-{job.id}.out" in done.stdout
    refused = subprocess.run(
        [sys.executable, "-m", "harness", "submit", *options, "--partition", "nonesuch", *flags],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert refused.returncode == 1
    assert "sbatch refuses the job: " in refused.stderr
    assert "partition" in refused.stderr
