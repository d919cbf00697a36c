"""What is said at the end of a run is what W&B has of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.tracking.run.close import describe_rows
from tests.support.wandb.artifact_processes import ended, start
from tests.support.wandb.file import records_of, written
from tests.support.wandb_server import WandbServer

OWN_STEPS = """
import json
from harness.tracking import TrackingConfig, WandbTracker

config = TrackingConfig(wandb_mode="online", wandb_run_id="steps", wandb_silent=True)
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


def test_rows_at_steps_of_the_users_own_are_counted_as_rows(server: WandbServer, tmp_path: Path) -> None:
    report = ended(start("-c", OWN_STEPS, folder=tmp_path, server=server)).splitlines()[-1]
    assert json.loads(report) == ["8 rows, all confirmed by the server"]
    assert len(server.run("steps").rows) == 8


def test_an_offline_run_whose_file_is_written_a_moment_later_has_lost_nothing(tmp_path: Path) -> None:
    path = tmp_path / "offline-run-1-a" / "run-a.wandb"
    written(path, [])
    settings = SimpleNamespace(sync_dir=str(path.parent), sync_file=str(path))
    run = SimpleNamespace(disabled=False, offline=True, settings=settings)
    later = threading.Timer(0.5, written, (path, records_of("a", start=1, rows=8)))
    later.start()
    assert describe_rows(run, 8, None, home=None) == []
    later.join()
