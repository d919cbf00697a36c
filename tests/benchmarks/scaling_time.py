"""
Step time of one process and of two, harness beside a bare Accelerate loop, under the same launch config.

`python -m tests.benchmarks.scaling_time [small|large] [rounds]` prints the median milliseconds of a step over the
medians of all rounds, interleaved. Each process has one thread and the same batch: two make a step of twice the
samples, and on as many cores it would ideally take as long.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import get_scheduler, set_seed

from harness.distributed.ranks import settle
from harness.train import main
from tests.benchmarks import step_time

ROOT = Path(__file__).parents[2]
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(ROOT / "launch_configs" / "ddp.yaml"),
]


def bare() -> None:
    """What the documentation of Accelerate shows."""
    set_seed(42)
    accelerator = Accelerator(cpu=True)
    task = step_time.build()
    optimizer = step_time.torch.optim.AdamW(task.model.parameters(), lr=step_time.LEARNING_RATE, fused=True)
    loader = DataLoader(task.train_dataset, batch_size=step_time.BATCH_SIZE, shuffle=True, collate_fn=step_time.collate)
    model, optimizer, loader = accelerator.prepare(task.model.train(), optimizer, loader)
    scheduler = get_scheduler("linear", optimizer, 0, len(loader))
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.wait_for_everyone()
    settle()
    accelerator.end_training()


def ours() -> None:
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{name}={value}" for name, value in step_time.ARGUMENTS.items() if name != "use_cpu"]
        # The bare loop does not search its graph for unused parameters.
        flags += ["--ddp_find_unused_parameters=false", f"--output_dir={folder}"]
        assert main(["--task=tests.benchmarks.step_time:build", *flags]) == 0


def measured(variant: str, size: str, num_processes: int) -> float:
    """Milliseconds of rank zero's median step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "milliseconds.json"
        script = [str(Path(__file__)), size, variant, str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        command = [*LAUNCH, f"--num_processes={num_processes}", *script]
        subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)
        return float(json.loads(out.read_text(encoding="utf-8")))


if __name__ == "__main__":
    if len(sys.argv) == 4 and not sys.argv[3].isdigit():  # one of the processes measured
        {"bare": bare, "ours": ours}[sys.argv[2]]()
        if os.environ.get("RANK", "0") == "0":
            times = step_time.calls[step_time.WARMUP_STEPS :]
            Path(sys.argv[3]).write_text(json.dumps(statistics.median(1000 * (b - a) for a, b in pairwise(times))))
        sys.exit()
    size = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in step_time.SIZES else "large"
    rounds = int(sys.argv[-1]) if sys.argv[-1].isdigit() else 5
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for variant in ("bare", "ours"):
            for count in (1, 2):
                found.setdefault((variant, count), []).append(measured(variant, size, count))
    for (variant, count), values in found.items():
        median, alone = statistics.median(values), statistics.median(found[variant, 1])
        beside = median / statistics.median(found["bare", count])
        spread = f"({min(values):.1f}-{max(values):.1f})"
        print(f"{variant} {count}  {median:8.2f} ms  {median / alone:.3f} x one process  {beside:.3f} x bare  {spread}")
