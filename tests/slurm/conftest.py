"""The tests of this folder need a SLURM; who names its folder (HARNESS_SLURM_DIR, as CI does) must have one."""

from __future__ import annotations

import os

import pytest

from tests.slurm.jobs import CLUSTER


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    if not (CLUSTER / "slurmctld.pid").exists():
        reason = f"no SLURM in {CLUSTER}: start one with tests/slurm/setup_cluster.sh"
        pytest.fail(reason) if os.environ.get("HARNESS_SLURM_DIR") else pytest.skip(reason)
