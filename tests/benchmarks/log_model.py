"""
What `WANDB_LOG_MODEL=checkpoint` adds to saves: the time that holds the training up, and the disk; 21 M parameters.

The Trainer and harness train with three saves, each in a process of its own against a W&B server on this machine. The
time is that of the training's thread for the logging of a save: in the Trainer's callback, in our checkpoint_logger.
The disk is the most in use below the run's folder and W&B's own, at any moment; ours without uploads is the base.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from harness.tasks import Task, TaskConfig
from tests.benchmarks.contest import OURS, Bound, Measured, Result, alternate
from tests.benchmarks.save import Tokens, stacked
from tests.support.wandb_server import WandbServer

SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 384, "vocab_size": 256, "n_positions": 32}
STEPS, SAVES = 12, 3
MOST_OF_TRAINER, MOST_DISK = 0.02, 1.005  # what is staged beside the hard links are texts
LOOKED_EVERY_SECONDS = 0.1


def build(config: TaskConfig | None = None) -> Task:
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0))
    return Task(model=model, train_dataset=Tokens(), data_collator=stacked)


def timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def measured(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - began)

    return measured


def arguments(folder: str) -> dict[str, Any]:
    return {
        "output_dir": f"{folder}/run",
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "logging_steps": 2,
        "save_steps": STEPS // SAVES,
        "report_to": "wandb",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def train(way: str, folder: str) -> None:
    """Train in this process, and print what the logging of the saves took."""
    logging: list[float] = []
    if way == "Trainer":
        import wandb
        from transformers import Trainer, TrainingArguments, set_seed
        from transformers.integrations import WandbCallback

        WandbCallback.on_save = timed(WandbCallback.on_save, logging)
        set_seed(42)
        task, given = build(), TrainingArguments(**arguments(folder))
        Trainer(task.model, given, data_collator=stacked, train_dataset=task.train_dataset).train()
        wandb.finish()
    else:
        from harness.tracking import WandbTracker
        from harness.train import main

        WandbTracker.checkpoint_logger = timed(WandbTracker.checkpoint_logger, logging)
        flags = [f"--{name}={value}" for name, value in arguments(folder).items()]
        assert main(["--task=tests.benchmarks.log_model:build", *flags]) == 0
    assert len(logging) == SAVES
    print(json.dumps(statistics.median(logging)))


def disk_in_use(folder: Path) -> int:
    found = {}
    for path in folder.rglob("*"):
        try:
            stat = path.lstat()
        except OSError:  # deleted meanwhile
            continue
        found[stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())


def trained(way: str, log_model: str) -> tuple[float, float]:
    """Train in a process; returns the seconds of the logging of a save, and the most disk in use in MB."""
    with tempfile.TemporaryDirectory() as scratch, WandbServer(Path(scratch) / "server") as server:
        folder = Path(scratch) / "work"
        folder.mkdir()
        own = {f"WANDB_{kind}_DIR": str(folder / kind.lower()) for kind in ("CACHE", "DATA", "CONFIG")}
        variables = {
            **{name: value for name, value in os.environ.items() if name != "WANDB_MODE"},
            **server.environment(),
            **own,
            "WANDB_DIR": str(folder),
            "WANDB_SILENT": "true",
            "WANDB_LOG_MODEL": log_model,
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "tests.benchmarks.log_model", way, str(folder)]
        most, done = [0], threading.Event()

        def look() -> None:
            while not done.wait(LOOKED_EVERY_SECONDS):
                most[0] = max(most[0], disk_in_use(folder))

        looking = threading.Thread(target=look)
        looking.start()
        try:
            ended = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        finally:
            done.set()
            looking.join()
        if ended.returncode != 0:
            raise RuntimeError(f"{way}: {ended.stdout[-1000:]}{ended.stderr[-3000:]}")
        arrived = [each for each in server.artifacts() if each.state == "COMMITTED"]
        assert len(arrived) > SAVES or log_model == "false"
        return float(ended.stdout.splitlines()[-1]), most[0] / 1e6


def measure(device: str, repeats: int) -> Measured:
    disk: dict[str, list[float]] = {}

    def way(name: str, who: str, log_model: str) -> float:
        seconds, megabytes = trained(who, log_model)
        disk.setdefault(name, []).append(megabytes)
        return seconds

    kinds = {
        OURS: (OURS, "checkpoint"),
        "ours without uploads": (OURS, "false"),
        "Trainer": ("Trainer", "checkpoint"),
        "Trainer without uploads": ("Trainer", "false"),
    }
    ways = {name: partial(way, name, *kind) for name, kind in kinds.items()}
    seconds = alternate(ways, repeats=repeats, again=False)
    setting = f"21 M parameters, 256 MB a checkpoint, {SAVES} saves"
    return [
        Result(
            what="log_model=checkpoint: what the logging of a save holds up",
            unit="s",
            figures={name: seconds[name] for name in (OURS, "Trainer")},
            base="Trainer",
            bounds=[Bound(relation="<=", limit=MOST_OF_TRAINER, over="Trainer")],
            setting=setting,
        ),
        Result(
            what="log_model=checkpoint: the most disk in use",
            unit="MB",
            figures=disk,
            base="ours without uploads",
            bounds=[Bound(relation="<=", limit=MOST_DISK, over="ours without uploads")],
            setting=setting,
        ),
    ]


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    train(sys.argv[1], sys.argv[2])
