"""
What a step of ours takes on two processes, beside a bare Accelerate loop on the same two, in windows that take turns.

Both processes train with harness; between its windows they make as many steps of a loop as Accelerate's documentation
shows it, wrapped in DDP like ours. Each process has one thread and a batch of its own, and the model is `step`'s larger
one. On as many cores as processes nothing else should run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import get_scheduler, set_seed

from harness.train import main
from tests.benchmarks.contest import OURS, ROOT, Bound, Result, in_process
from tests.benchmarks.gpu import models
from tests.benchmarks.gpu.contest import LEARNING_RATE, MAX_GRAD_NORM, flags
from tests.benchmarks.gpu.models import Batch, Work, offered, stacked

BASE = "bare Accelerate"
LARGE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1024, "n_positions": 128}  # about 100 ms on a core
STEPS, ROUNDS, WARMUP_STEPS = 8, 5, 6  # of a window; windows in a repeat; before the first window


def measure(device: str, repeats: int) -> list[Result]:
    options = [f"--config_file={ROOT / 'launch_configs' / 'ddp.yaml'}", "--num_processes=2", "-m", __name__]
    variables = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    found = in_process("accelerate.commands.launch", *options, str(repeats * ROUNDS), **variables)
    figures = {
        BASE: [statistics.median(found["bare"][i::repeats]) for i in range(repeats)],
        OURS: [statistics.median(found["ours"][i::repeats]) for i in range(repeats)],
        f"{BASE} again": [statistics.median(found["again"][i::repeats]) for i in range(repeats)],
    }
    bound = Bound(relation="<=", limit=1.01, over=BASE)
    setting = "GPT-2 with 0.94 M parameters, batch 8 x 128 each, DDP of gloo on two processes of one thread"
    return [
        Result(what="step on two processes", unit="ms", figures=figures, base=BASE, bounds=[bound], setting=setting)
    ]


class Loop:
    """What the documentation of Accelerate shows."""

    def __init__(self, work: Work) -> None:
        self.accelerator = Accelerator(cpu=True)
        model = work.model().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        loader = DataLoader(work.dataset, batch_size=work.batch, shuffle=True, collate_fn=stacked)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.scheduler = get_scheduler("linear", self.optimizer, 0, 10**6)
        self.batches = self._batches()

    def _batches(self) -> Iterator[Batch]:
        while True:
            yield from self.loader

    def seconds(self, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            batch = next(self.batches)
            self.accelerator.backward(self.model(**batch).loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - began


class Turns:
    """Our collator, called once a step on each rank: it times our windows, and lets the bare loop take its turns."""

    def __init__(self, work: Work, rounds: int) -> None:
        self.work, self.rounds, self.calls = work, rounds, 0
        self.loop: Loop | None = None  # made once the ranks know each other
        self.bare: list[float] = []
        self.ours: list[float] = []
        self.began = 0.0

    @property
    def num_steps(self) -> int:
        return WARMUP_STEPS + self.rounds * STEPS + 2

    def __call__(self, samples: Sequence[Batch]) -> Batch:
        self.calls += 1
        if self.calls > WARMUP_STEPS and (self.calls - WARMUP_STEPS - 1) % STEPS == 0 and len(self.ours) < self.rounds:
            self._turn()
        return stacked(samples)

    def _turn(self) -> None:
        now = time.perf_counter()
        if self.loop is None:
            self.loop = Loop(self.work)
            self.loop.seconds(WARMUP_STEPS)
        else:
            self.ours.append(1000 * (now - self.began) / STEPS)
        self.bare.append(1000 * self.loop.seconds(STEPS) / STEPS)
        self.began = time.perf_counter()

    def figures(self) -> dict[str, list[float]]:
        """Milliseconds of a step by window: ours, over the bare loop's around it, times the bare loop's middle."""
        middle = statistics.median(self.bare)
        around = [(a + b) / 2 for a, b in pairwise(self.bare)]
        again = [middle * b / a for a, b in pairwise(self.bare)]
        ours = [middle * own / bare for own, bare in zip(self.ours, around, strict=True)]
        return {"bare": [middle] * len(ours), "again": again, "ours": ours}


def train(rounds: int) -> dict[str, Any]:
    """Collective: train on this rank until all its windows are measured; returns the figures."""
    torch.set_num_threads(1)
    set_seed(42)
    work = Work(models.gpt2(LARGE), batch=8, length=LARGE["n_positions"], device="cpu", bf16=False)
    turns = Turns(work, rounds)
    given = {
        "per_device_train_batch_size": work.batch,
        "max_steps": turns.num_steps,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": MAX_GRAD_NORM,
        "logging_steps": 500,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,  # the bare loop does not look for them
    }
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, offered(work, turns), contextlib.redirect_stdout(said):
        code = main([f"--task={models.TASK}", f"--output_dir={folder}/run", *flags(given)])
    if code != 0:
        raise RuntimeError(f"harness ended with {code}")
    return turns.figures()


if __name__ == "__main__":
    from tests.benchmarks import ddp  # by whose name the task is found

    figures = ddp.train(int(sys.argv[1]))
    if os.environ["RANK"] == "0":
        print(json.dumps(figures))
