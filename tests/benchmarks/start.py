"""
How long it takes from the start of a process to its first optimizer step: the Trainer, bare Accelerate and harness.

The task is the same, a small GPT-2 and samples in memory; tracking is off, or W&B's, offline. Each start is a process
of its own, which ends behind the step; a first one of each, which writes Python's caches, does not count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.tasks import Task
    from tests.benchmarks.contest import Measured

ROOT = Path(__file__).parents[2]
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 256, "n_positions": 32}
ARGUMENTS = {"per_device_train_batch_size": 8, "max_steps": 1000, "save_strategy": "no", "use_cpu": True}
MOST = {"none": 0.9, "wandb": 0.8}
FLOOR = "bare Accelerate's imports, without the Trainer's, peft's and W&B's"


def samples() -> list[dict[str, Any]]:
    import torch

    rows = [torch.arange(i, i + 16) % 256 for i in range(64)]
    return [{"input_ids": row, "labels": row} for row in rows]


def model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0))


def end_after_a_step() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: (print(time.time(), flush=True), os._exit(0)))


def build(config: Any) -> Task:
    from transformers import default_data_collator  # which the Trainer takes by itself

    from harness.tasks import Task

    end_after_a_step()
    return Task(model=model(), train_dataset=samples(), data_collator=default_data_collator)


def by_trainer(folder: str, report_to: str) -> None:
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(42)
    end_after_a_step()
    arguments: Any = {**ARGUMENTS, "output_dir": folder, "report_to": report_to, "disable_tqdm": True}
    Trainer(model(), TrainingArguments(**arguments), train_dataset=samples()).train()


def by_accelerate(folder: str, report_to: str) -> None:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from torch.utils.data import DataLoader

    set_seed(42)
    end_after_a_step()
    accelerator = Accelerator(cpu=True, log_with=[] if report_to == "none" else report_to, project_dir=folder)
    accelerator.init_trackers("huggingface")
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters())
    trained, optimizer, loader = accelerator.prepare(trained, optimizer, DataLoader(samples(), batch_size=8))
    for batch in loader:
        accelerator.backward(trained(**batch).loss)
        optimizer.step()


def command(way: str, folder: str, report_to: str) -> Sequence[str]:
    if way != "ours":
        return [sys.executable, "-m", "tests.benchmarks.start", way, folder, report_to]
    flags = {**ARGUMENTS, "output_dir": folder, "report_to": report_to, "task": "tests.benchmarks.start:build"}
    return [sys.executable, "-m", "harness", "train", *(f"--{name}={value}" for name, value in flags.items())]


def started(way: str, report_to: str) -> float:
    """Seconds from the start of a process to the end of its first step."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": folder, "PYTHONPATH": str(ROOT)}
        environment = {**os.environ, **own, "HF_HUB_OFFLINE": "1"}
        began = time.time()
        ended = subprocess.run(
            command(way, folder, report_to), capture_output=True, text=True, check=False, cwd=ROOT, env=environment
        )
        if ended.returncode != 0:
            raise RuntimeError(f"{way}: {ended.stdout[-1000:]}{ended.stderr[-3000:]}")
        time.sleep(0.5)  # W&B's process sees that its parent is gone
        return float(ended.stdout.split()[-1]) - began


def measure(device: str, repeats: int) -> Measured:
    from tests.benchmarks.contest import OURS, Bound, Result, alternate

    found = []
    for report_to, most in MOST.items():
        ways: dict[str, Callable[[], float]] = {
            name: partial(started, name, report_to) for name in (OURS, "Trainer", "accelerate")
        }
        figures = alternate(ways, repeats=repeats, warmup=1)
        bound = Bound(relation="<=", limit=most, over="Trainer", floor=FLOOR)
        tracking = "without tracking" if report_to == "none" else "with W&B, offline"
        what = f"from the start of the process to its first step, {tracking}"
        found.append(Result(what=what, unit="s", figures=figures, base=OURS, bounds=[bound], setting="a small GPT-2"))
    return found


if __name__ == "__main__":
    {"Trainer": by_trainer, "accelerate": by_accelerate}[sys.argv[1]](*sys.argv[2:])
