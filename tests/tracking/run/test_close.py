"""What is said at the end of a run is what W&B has of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.wandb.artifact_processes import ended, start
from tests.support.wandb_server import WandbServer

OWN_STEPS = """
import json, sys
from harness.tracking import TrackingConfig, WandbTracker

config = TrackingConfig(wandb_mode=sys.argv[1], wandb_run_id=sys.argv[2], wandb_silent=True)
tracker = WandbTracker(config, dir=".", output_dir=".")
tracker.start()
for step in range(1, 72, 10):
    tracker.tracker.log({"own": step}, step=step)
tracker.finish()
print(json.dumps(tracker.report()))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_rows_at_steps_of_the_users_own_are_counted_as_rows(mode: str, server: WandbServer, tmp_path: Path) -> None:
    process = start("-c", OWN_STEPS, mode, "steps", folder=tmp_path, server=server if mode == "online" else None)
    report = json.loads(ended(process).splitlines()[-1])
    assert report == (["8 rows, all confirmed by the server"] if mode == "online" else [])
    if mode == "online":
        assert len(server.run("steps").rows) == 8
