"""
How long a save holds the training up: the Trainer, `accelerate.save_state` and harness, 85 M parameters (1 GB).

`python -m tests.benchmarks.save_time [rounds]` trains one step with each, then saves in turn, all in one process; two
checkpoints of each are kept. It prints the medians of the time until training can go on, their ratios, a step of
harness with and without a save being written meanwhile, and the memory of the copies.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from transformers import Trainer, TrainingArguments, set_seed

from harness.build import assemble, build_run, plan_run
from harness.data.loader import step_groups
from harness.distributed.accelerator import build_accelerator, choose_backend
from harness.flags import parse
from harness.loop import train_step
from harness.session import Run
from harness.snapshot import save
from harness.tasks import Task
from harness.tracking.lifecycle import wandb_tracker
from harness.training.state import TrainState

STEPS_BESIDE, KEPT = 5, 2
CPU = {"use_cpu": True}


def with_trainer(folder: Path, task: Task, where: Mapping[str, Any] = CPU) -> Callable[[], None]:
    set_seed(42)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        max_steps=1,
        save_strategy="no",
        save_total_limit=KEPT,
        report_to="none",
        disable_tqdm=True,
        **where,
    )
    trainer = Trainer(task.model, arguments, data_collator=task.data_collator, train_dataset=task.train_dataset)
    trainer.train()

    def saves() -> None:
        trainer.state.global_step += 1
        trainer._save_checkpoint(trainer.model_wrapped, trial=None)

    return saves


def with_accelerate(folder: Path, task: Task) -> Callable[[], Any]:
    project = ProjectConfiguration(project_dir=str(folder), automatic_checkpoint_naming=True, total_limit=KEPT)
    accelerator = Accelerator(cpu=True, project_config=project)
    model, optimizer = accelerator.prepare(task.model, torch.optim.AdamW(task.model.parameters(), fused=True))
    accelerator.backward(model(**task.data_collator([task.train_dataset[0]])).loss)
    optimizer.step()
    return accelerator.save_state


def with_harness(
    folder: Path, task: str, where: Mapping[str, Any] = CPU
) -> tuple[Run, Callable[[], None], Callable[[], None]]:
    """The run of the task of that name, what saves it and what makes a step of it."""
    flags = [f"--task={task}", "--per_device_train_batch_size=1", "--max_steps=1000", "--report_to=none"]
    flags += [f"--output_dir={folder}", f"--save_total_limit={KEPT}", *(f"--{k}={v}" for k, v in where.items())]
    config = parse(flags)
    accelerator = build_accelerator(config.topology, activation_checkpointing=False)
    session, state = assemble(config, choose_backend(accelerator), folder, is_resumed=False), TrainState()
    run = build_run(session, plan_run(session), state, wandb_tracker([]))
    run.model.train()
    windows = (window for epoch in range(1000) for window in step_groups(run.loader.epoch(epoch), 1))

    def steps() -> None:
        train_step(run, state, next(windows))
        state.global_step += 1

    steps()

    def saves() -> None:
        state.global_step += 1
        save(run, state)

    return run, saves, steps


def timed(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main(rounds: int) -> None:
    from tests.benchmarks.log_model_time import build  # it brings a server of W&B's, which other users do without

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run, saves, steps = with_harness(folder / "harness", "tests.benchmarks.log_model_time:build")
        ways: dict[str, Callable[[], Any]] = {
            "Trainer": with_trainer(folder / "trainer", build()),
            "accelerate.save_state": with_accelerate(folder / "accelerate", build()),
            "harness": saves,
        }
        held: dict[str, list[float]] = {name: [] for name in ways}
        alone, beside, written = [], [], []
        for i in range(rounds + 1):
            for name, way in ways.items():
                seconds = timed(way)
                if name == "harness":
                    began = time.perf_counter()
                    beside += [timed(steps) for _ in range(STEPS_BESIDE)]
                    run.checkpoints.settle()
                    written.append(time.perf_counter() - began)
                    alone += [timed(steps) for _ in range(STEPS_BESIDE)]
                if i > 0:  # the first one allocates
                    held[name].append(seconds)
        medians = {name: statistics.median(times) for name, times in held.items()}
        for name, median in medians.items():
            ratio = medians["harness"] / median
            print(f"{name:24} {median:.3f} s ({min(held[name]):.3f}-{max(held[name]):.3f}), harness / it: {ratio:.3f}")
        print(
            f"a step of harness: {statistics.median(alone):.3f} s, beside the writer {statistics.median(beside):.3f} s"
        )
        print(f"written after {statistics.median(written):.2f} s; {run.checkpoints.describe()}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
