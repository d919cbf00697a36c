"""
Step time of a bare torch loop, transformers.Trainer and harness on the same model and data, interleaved.

`python -m tests.benchmarks.step_time [small|large] [rounds]` prints the median milliseconds of a step over the
medians of all rounds, and ratios to the bare loop; "bare again" shows how far two equal loops are apart.
A step is timed from one call of the collator to the next, the same way for all four.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, get_scheduler, set_seed

from harness.tasks import Task, TaskConfig
from harness.train import main

SIZES = {
    "small": {"shape": {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 256}, "length": 32, "steps": 250},
    "large": {"shape": {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1024}, "length": 128, "steps": 50},
}
BATCH_SIZE, WARMUP_STEPS, LEARNING_RATE = 8, 5, 1e-3
SIZE = SIZES[sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in SIZES else "small"]
calls: list[float] = []


class Tokens(Dataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        size = (BATCH_SIZE * SIZE["steps"], SIZE["length"])
        self.tokens = torch.randint(0, SIZE["shape"]["vocab_size"], size, generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    calls.append(time.perf_counter())
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def build(config: TaskConfig | None = None) -> Task:
    model = GPT2LMHeadModel(GPT2Config(**SIZE["shape"], n_positions=SIZE["length"], bos_token_id=0, eos_token_id=0))
    return Task(model=model, train_dataset=Tokens(), data_collator=collate)


def bare() -> None:
    """What one writes by hand: no accelerator, no logging, no counting."""
    set_seed(42)
    task = build()
    model = task.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    loader = DataLoader(task.train_dataset, batch_size=BATCH_SIZE, shuffle=True, collate_fn=collate)
    scheduler = get_scheduler("linear", optimizer, 0, len(loader))
    for batch in loader:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH_SIZE,
    "num_train_epochs": 1,
    "learning_rate": LEARNING_RATE,
    "logging_steps": 100,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def trainer() -> None:
    set_seed(42)
    task = build()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, **ARGUMENTS)
        Trainer(task.model, arguments, data_collator=collate, train_dataset=task.train_dataset).train()


def ours() -> None:
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{name}={value}" for name, value in ARGUMENTS.items()]
        assert main(["--task=tests.benchmarks.step_time:build", f"--output_dir={folder}", *flags]) == 0


def milliseconds(variant: Any) -> float:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    calls.clear()
    with contextlib.redirect_stdout(io.StringIO()):
        variant()
    times = calls[WARMUP_STEPS:]
    return statistics.median(1000 * (b - a) for a, b in itertools.pairwise(times))


if __name__ == "__main__":
    # The task is looked up by name: that must be this module, whose list the collator fills.
    sys.modules["tests.benchmarks.step_time"] = sys.modules["__main__"]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rounds = int(sys.argv[-1]) if sys.argv[-1].isdigit() else 5
    variants = {"bare": bare, "bare again": bare, "trainer": trainer, "ours": ours}
    measured: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            measured[name].append(milliseconds(variant))
    base = statistics.median(measured["bare"])
    for name, values in measured.items():
        median = statistics.median(values)
        print(f"{name:10}  {median:8.3f} ms  {median / base:.3f} x bare  ({min(values):.3f}-{max(values):.3f})")
