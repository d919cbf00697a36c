"""
What a logged row costs the training: `WandbTracker.log` beside `Run.log` and the Trainer's callback, in turns.

`python -m tests.benchmarks.row_time [rounds]` prints the median milliseconds of a row of ten values, in an offline run
and in one that goes to a W&B server on this machine.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["WANDB_SILENT"] = "true"

import wandb
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback

from harness.tracking import TrackingConfig, WandbTracker
from tests.support.wandb_server import WandbServer

ROW = {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 3e-4, "epoch": 0.5, **{f"own_{i}": float(i) for i in range(6)}}
PAUSE_SECONDS = 0.005  # a training has steps between its rows


def measure(folder: str, mode: str, rounds: int) -> dict[str, list[float]]:
    run = wandb.init(project="rows", dir=folder, mode=mode)
    tracker = WandbTracker(TrackingConfig())
    tracker.start()  # adopts the run
    callback, control = WandbCallback(), TrainerControl()
    arguments = TrainingArguments(output_dir=folder, use_cpu=True, report_to="none")
    state = TrainerState(is_world_process_zero=True)
    callback._initialized = True
    times: dict[str, list[float]] = {"Run.log": [], "Trainer": [], "ours": []}
    for step in range(1, rounds + 1):
        state.global_step = step
        for kind in times:
            row: dict[str, Any] = dict(ROW)
            begin = time.perf_counter()
            if kind == "Run.log":
                run.log({f"train/{name}": value for name, value in row.items()} | {"train/global_step": step})
            elif kind == "Trainer":
                callback.on_log(arguments, state, control, model=None, logs=row)
            else:
                tracker.log(row, step=step)
            times[kind].append(1000 * (time.perf_counter() - begin))
            time.sleep(PAUSE_SECONDS)
    run.finish()
    return times


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as scratch, WandbServer(Path(scratch) / "server") as server:
        os.environ.update(server.environment())
        for mode in ("offline", "online"):
            for kind, values in measure(scratch, mode, rounds).items():
                ordered = sorted(values)
                print(
                    f"{mode:8} {kind:8} {statistics.median(values):.3f} ms a row "
                    f"(95 of 100 below {ordered[int(0.95 * len(ordered))]:.3f})"
                )
