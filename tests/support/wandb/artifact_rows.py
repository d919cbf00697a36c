"""
A run of rows that waits half-way, so that its server may die: a script for a process of its own.

`python -m tests.support.wandb.artifact_rows RUN_ID ROWS EXIT_CODE [preempted]` prints `half` after half of the rows and
goes on when it reads a line; the last line that it prints is JSON: what was said of the run, and how long its end took.
"""

from __future__ import annotations

import json
import math
import sys
import time

import numpy as np
import wandb

from harness.tracking import TrackingConfig, WandbTracker


def main(run_id: str, rows: int, exit_code: int, is_preempted: bool) -> None:
    config = TrackingConfig(
        wandb_mode="online", wandb_run_id=run_id, wandb_silent=True, wandb_finish_timeout=60 if is_preempted else 2
    )
    settings = {"x_file_stream_transmit_interval": 1}
    tracker = WandbTracker(config, dir=".", log_model="checkpoint", output_dir=".", settings=settings)
    tracker.start()
    for step in range(rows):
        values = {"loss": 1 / (step + 1), "grad_norm": math.nan, "nested": {"a": step, "b": {"c": 2}}}
        if step % 4 == 0:
            values["own/histogram"] = wandb.Histogram(np.arange(step + 2))
        tracker.log(values, step=step * 10)
        if step == rows // 2:
            print("half", flush=True)
            sys.stdin.readline()
    tracker.log({"train_runtime": 3.5, "train_loss": math.inf}, step=rows * 10)
    began = time.perf_counter()
    if is_preempted:
        tracker.mark_preempting()
    tracker.finish(exit_code)
    print(json.dumps({"seconds": time.perf_counter() - began, "report": tracker.report()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "preempted" in sys.argv[4:])
