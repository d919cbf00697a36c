"""
What `WANDB_LOG_MODEL=checkpoint` costs: the Trainer and harness, with and without it, 85 M parameters, three saves.

`python -m tests.benchmarks.log_model_time [rounds]` runs each in a process of its own against a W&B server on this
machine. It prints, as medians, how long the training's thread is held by a save (in the Trainer's _save_checkpoint and
its callback, in our `save`), what of it is the logging (the callback, our checkpoint_logger), how long a save stops the
training in all (the longest intervals between two calls of the collator, less a step: steps beside a writer are slow),
the whole training, the end after its last step, and the most disk in use.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from harness import loop
from harness.tasks import Task, TaskConfig
from harness.tracking import WandbTracker
from harness.train import main
from tests.support.wandb_server import WandbServer

SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 256, "n_positions": 32}
STEPS, SAVES, WARMUP_STEPS = 60, 3, 3
calls: list[float] = []
logging: list[float] = []
held: list[float] = []


class Tokens(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(index, index + 16)
        return {"input_ids": tokens, "labels": tokens}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    calls.append(time.perf_counter())
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def build(config: TaskConfig | None = None) -> Task:
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0))
    return Task(model=model, train_dataset=Tokens(), data_collator=collate)


def timed(function: Callable[..., Any], times: list[float] = logging) -> Callable[..., Any]:
    def measured(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - begin)

    return measured


def arguments(folder: str) -> dict[str, Any]:
    return {
        "output_dir": f"{folder}/run",
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "logging_steps": 5,
        "save_steps": STEPS // SAVES,
        "report_to": "wandb",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def train(who: str, folder: str) -> None:
    begin = time.perf_counter()
    if who == "trainer":
        import wandb
        from transformers.integrations import WandbCallback

        WandbCallback.on_save = timed(WandbCallback.on_save)
        Trainer._save_checkpoint = timed(Trainer._save_checkpoint, held)
        set_seed(42)
        task = build()
        given = TrainingArguments(**arguments(folder))
        trainer = Trainer(task.model, given, data_collator=collate, train_dataset=task.train_dataset)
        trainer.train()
        trainer.save_model()
        wandb.finish()
    else:
        WandbTracker.checkpoint_logger = timed(WandbTracker.checkpoint_logger)
        loop.save = timed(loop.save, held)
        flags = [f"--{name}={value}" for name, value in arguments(folder).items()]
        assert main(["--task=tests.benchmarks.log_model_time:build", *flags]) == 0
    times = calls[WARMUP_STEPS:]
    intervals = sorted(b - a for a, b in itertools.pairwise(times))
    step = statistics.median(intervals)
    stalls = [interval - step for interval in intervals[-(SAVES - 1) :]]  # the last save has no call behind it
    found = {
        "step": step,
        "stall": statistics.median(stalls),
        "logging": statistics.median(logging or [0.0]),
        # The Trainer's callback comes after its save, our logger is a part of it.
        "held": statistics.median(held) + (statistics.median(logging or [0.0]) if who == "trainer" else 0.0),
        "training": calls[-1] - begin,
        "end": time.perf_counter() - calls[-1],
    }
    Path(folder, "measured.json").write_text(json.dumps(found), encoding="utf-8")


def disk_in_use(folder: Path) -> int:
    found = {}
    for path in folder.rglob("*"):
        try:
            stat = path.lstat()
        except OSError:  # deleted meanwhile
            continue
        found[stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())


def measure(who: str, log_model: str) -> dict[str, float]:
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
        command = [sys.executable, "-m", "tests.benchmarks.log_model_time", who, str(folder)]
        process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL)
        most, done = [0], threading.Event()

        def look() -> None:
            while not done.wait(0.2):
                most[0] = max(most[0], disk_in_use(folder))

        looking = threading.Thread(target=look)
        looking.start()
        code = process.wait()
        done.set()
        looking.join()
        assert code == 0
        arrived = [each for each in server.artifacts() if each.state == "COMMITTED"]
        found = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
        return {**found, "disk": most[0] / 1e9, "artifacts": len(arrived)}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        # The task is looked up by name: that must be this module, whose list the collator fills.
        sys.modules["tests.benchmarks.log_model_time"] = sys.modules["__main__"]
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
        train(sys.argv[1], sys.argv[2])
        sys.exit()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    kinds = [(who, log_model) for who in ("trainer", "harness") for log_model in ("false", "checkpoint")]
    measured: dict[tuple[str, str], list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            measured[kind].append(measure(*kind))
    for (who, log_model), each in measured.items():
        medians = {name: statistics.median(found[name] for found in each) for name in each[0]}
        stalls = [found["stall"] for found in each]
        print(
            f"{who:8} {log_model:10} step {medians['step']:.3f} s  a save holds the thread {medians['held']:.3f} s, "
            f"logging {medians['logging']:.4f} s of it; it stops the training {medians['stall']:.2f} s "
            f"({min(stalls):.2f}-{max(stalls):.2f})"
        )
        print(
            f"{'':19} training {medians['training']:.1f} s  end {medians['end']:.1f} s  "
            f"disk {medians['disk']:.2f} GB  artifacts {medians['artifacts']:g}"
        )
