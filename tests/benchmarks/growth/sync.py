"""
How long `harness sync` takes by the number of rows: all of an offline run, and a look at one that is being written.

A tracker logs so many rows to an offline run; a first look brings them to a W&B server on this machine. Then some rows
more are logged, and a look brings these.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

from tests.benchmarks.contest import OURS, Curve
from tests.benchmarks.growth.rows import row_of
from tests.support.wandb_server import WandbServer

SIZES = (1_000, 10_000, 100_000)
MORE_ROWS = 100
LINEAR, LOOK = 1.1, 0.5


def measure(device: str, repeats: int) -> list[Curve]:
    whole: dict[float, list[float]] = {}
    looks: dict[float, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch, WandbServer(Path(scratch) / "server") as server:
        os.environ.update(server.environment())
        for size in SIZES:
            found = synced(Path(scratch) / str(size), size, looks=repeats)
            whole[size], looks[size] = found[:1], found[1:]
    look = f"a look at a run with {MORE_ROWS} new rows"
    return [
        Curve(what="a sync of a whole run", unit="s", size="rows", figures={OURS: whole}, most_growth=LINEAR),
        Curve(what=look, unit="s", size="rows", figures={OURS: looks}, most_growth=LOOK),
    ]


def synced(folder: Path, size: int, *, looks: int) -> list[float]:
    """Seconds of the first look, which brings all rows, and of so many others."""
    from harness.commands.watch import Watch
    from harness.tracking import TrackingConfig, WandbTracker
    from harness.tracking.run.attempts import Attempts

    folder.mkdir()
    tracker = WandbTracker(
        TrackingConfig(wandb_mode="offline"),
        output_dir=folder,
        attempts=Attempts(folder, resumes=False),
        project="rows",
        dir=str(folder),
    )
    tracker.start()
    written, seconds = 0, []
    watch = Watch([folder])
    for count in (size, *[MORE_ROWS] * looks):
        for number in range(written, written + count):
            row = {name.removeprefix("train/"): value for name, value in row_of(number).items()}
            tracker.log(row, step=int(row.pop("global_step")))
        written += count
        wait_until_written(folder)
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            watch.round()
        seconds.append(time.perf_counter() - began)
    tracker.finish()
    return seconds


def wait_until_written(folder: Path) -> None:
    """Until wandb's file grows no more: its process writes beside this one."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    size = -1
    while size != (now := path.stat().st_size):
        size = now
        time.sleep(1.0)
