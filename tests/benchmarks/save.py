"""
How long a save holds a training up, and what its writer costs the steps meanwhile: 85 M parameters, 1.02 GB.

The Trainer, `accelerate.save_state`, `torch.distributed.checkpoint.async_save` with a stager that is kept, and harness
save the same model in turns, in one process; each waits for a quiet disk. Two checkpoints of each are kept. After a
save of ours its steps are timed for as long as the writer writes, and then without it. The curve is of ours alone.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration
from torch.distributed import checkpoint
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from harness.build import assemble, build_run, plan_run
from harness.data.loader import step_groups
from harness.distributed.accelerator import build_accelerator, choose_backend
from harness.flags import parse
from harness.loop import train_step
from harness.session import Run
from harness.snapshot import save
from harness.tasks import Task, TaskConfig
from harness.tracking.lifecycle import wandb_tracker
from harness.training.state import TrainState
from tests.benchmarks.contest import OURS, Bound, Curve, Measured, Result, alternate

STEPS_BESIDE, KEPT = 5, 2
WIDTH = 768  # 85 M parameters
WIDTHS = (192, 384, 768)  # 21, 85 and 341 MB of weights, three times as much in a checkpoint
MOST_OF_TRAINER, MOST_OF_DCP, MOST_BESIDE = 0.05, 0.7, 1.5
CPU = {"use_cpu": True}
NUM_ROWS = 1000


class Tokens(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(index, index + 16) % 256
        return {"input_ids": tokens, "labels": tokens}


def stacked(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def build(config: TaskConfig | None = None) -> Task:
    width = int(((config.task_args if config is not None else None) or {}).get("width", WIDTH))
    shape = {"n_layer": 12, "n_head": 12, "n_embd": width, "vocab_size": 256, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    return Task(model=model, train_dataset=Tokens(), data_collator=stacked)


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


def with_accelerate(folder: Path, task: Task) -> tuple[Callable[[], Any], Callable[[], Callable[[], object]]]:
    """What saves by `save_state`, and what saves the same by dcp: it returns what waits for the disk."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # torch 2.9 or newer

    project = ProjectConfiguration(project_dir=str(folder), automatic_checkpoint_naming=True, total_limit=KEPT)
    accelerator = Accelerator(cpu=True, project_config=project)
    model, optimizer = accelerator.prepare(task.model, torch.optim.AdamW(task.model.parameters(), fused=True))
    accelerator.backward(model(**stacked([task.train_dataset[0]])).loss)
    optimizer.step()
    number = count()
    # Neither pinned memory nor another thread: both take a card.
    kept = DefaultStager(StagingOptions(False, False, False, False))

    def by_dcp() -> Callable[[], object]:
        i = next(number)
        shutil.rmtree(folder / f"dcp-{i - KEPT}", ignore_errors=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        saving: Any = checkpoint.async_save(state, checkpoint_id=str(folder / f"dcp-{i}"), async_stager=kept)
        return getattr(saving, "upload_completion", saving).result  # type: ignore[no-any-return]

    return accelerator.save_state, by_dcp


def with_harness(
    folder: Path, task: str, where: Mapping[str, Any] = CPU, **more: Any
) -> tuple[Run, Callable[[], None], Callable[[], None]]:
    """The run of the task of that name, what saves it and what makes a step of it."""
    flags = [f"--task={task}", "--per_device_train_batch_size=1", "--max_steps=1000", "--report_to=none"]
    flags += [f"--output_dir={folder}", f"--save_total_limit={KEPT}"]
    flags += [f"--{name}={value}" for name, value in {**where, **more}.items()]
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


@dataclass
class Ours:
    """Saves of ours, the steps that are made while each is written, and as many without a writer."""

    run: Run
    saves: Callable[[], None]
    steps: Callable[[], None]
    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        held = timed(self.saves)
        began, thread = time.perf_counter(), self.run.checkpoints._thread
        beside: list[float] = []
        while thread is not None and thread.is_alive():
            beside.append(timed(self.steps))
        self.written.append(time.perf_counter() - began)
        self.run.checkpoints.settle()
        self.alone.append(statistics.fmean(timed(self.steps) for _ in range(STEPS_BESIDE)))
        self.beside.append(statistics.fmean(beside[:-1] or beside))  # the last has ended without the writer
        return held


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder, and accelerate's state as it is at the start of a process."""
    with tempfile.TemporaryDirectory() as folder:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        yield Path(folder)


def measure(device: str, repeats: int) -> Measured:
    with scratch() as folder:
        ours = Ours(*with_harness(folder / "harness", "tests.benchmarks.save:build"))
        save_state, by_dcp = with_accelerate(folder / "accelerate", build())

        def dcp() -> float:
            began = time.perf_counter()
            wait = by_dcp()
            held = time.perf_counter() - began
            wait()
            return held

        trainers = with_trainer(folder / "trainer", build())
        ways = {OURS: ours, "dcp": dcp, "accelerate": lambda: timed(save_state), "Trainer": lambda: timed(trainers)}
        figures = alternate(ways, repeats=repeats, warmup=1)
    held = Result(
        what="what a save holds the training up",
        unit="s",
        figures=figures,
        base=OURS,
        bounds=[
            Bound(relation="<=", limit=MOST_OF_TRAINER, over="Trainer"),
            Bound(relation="<=", limit=MOST_OF_DCP, over="dcp"),
        ],
        setting=f"85 M parameters, 1.02 GB; on disk {statistics.median(ours.written):.1f} s later",
    )
    steps = Result(
        what="a step beside the writer of a save",
        unit="s",
        figures={"alone": ours.alone[2:], "beside": ours.beside[2:]},  # those of the rounds that count
        base="alone",
        bounds=[Bound(relation="<=", limit=MOST_BESIDE, of="beside", over="alone")],
        setting=f"85 M parameters, batch of 1 x 16 tokens, {torch.get_num_threads()} threads",
    )
    return [held, steps, *sizes(repeats)]


def sizes(repeats: int) -> Measured:
    """Held and written against the size of a checkpoint."""
    held: dict[float, list[float]] = {}
    written: dict[float, list[float]] = {}
    for width in WIDTHS:
        with scratch() as folder:
            task_args = f'{{"width": {width}}}'
            run, saves, _ = with_harness(folder, "tests.benchmarks.save:build", task_args=task_args)
            num_bytes = 3.0 * sum(each.nbytes for each in run.bare_model.parameters())
            for i in range(repeats + 1):
                seconds, rest = timed(saves), timed(run.checkpoints.settle)
                if i > 0:  # the first one allocates
                    held.setdefault(num_bytes / 1e6, []).append(seconds)
                    written.setdefault(num_bytes / 1e6, []).append(seconds + rest)
    setting = "GPT-2 of 12 layers; nothing is trained meanwhile"
    return [
        Curve(what="what a save holds up", unit="s", size="MB", figures={OURS: held}, most_growth=1.2, setting=setting),
        Curve(what="a save on disk", unit="s", size="MB", figures={OURS: written}, most_growth=1.2, setting=setting),
    ]
