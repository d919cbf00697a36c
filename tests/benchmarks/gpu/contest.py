"""
A bare loop, the Trainer and harness on the same model and batches, in turns.

The bare loop waits in memory while one of the others trains. Their collator is called once a step: at every so many
calls it waits for the device, notes the time, and lets the bare loop make as many steps. So each window of theirs lies
between two of the bare loop's, all begin and end with an idle device, and each loop is compiled once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler, set_seed

from harness.train import main
from tests.benchmarks.gpu import models
from tests.benchmarks.gpu.models import Batch, Options, Work, stacked
from tests.benchmarks.gpu.outcomes import Device, Figures, rounded

WARMUP_STEPS = 6  # the first compiles, the second makes the optimizer's state a part of the memory
LEARNING_RATE, WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 6e-4, 0.1, (0.9, 0.95), 1.0
LOGGING_STEPS = 25  # or one report a window, if that is shorter


def compile_backend(device: str) -> str:
    # inductor would take its time on two cores.
    return "inductor" if device == "cuda" else "aot_eager"


class Bare:
    """What one writes by hand, in nanoGPT's manner: no accelerator, no logging, no counting."""

    def __init__(self, work: Work, device: Device) -> None:
        set_seed(42)
        self.work, self.device = work, device
        self.model = work.model().train()
        if hasattr(self.model, "config"):
            self.model.config.use_cache = False
        if work.recomputes:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.forward: Any = self.model
        if work.compiles:
            self.forward = torch.compile(self.model, backend=compile_backend(work.device))
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
        self.scheduler = get_scheduler("linear", self.optimizer, 0, 10**6)
        self.batches = self._batches()

    def _batches(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.work.dataset,
            batch_size=self.work.batch,
            shuffle=True,
            collate_fn=stacked,
            pin_memory=self.device.on_cuda,
        )
        while True:
            yield from loader

    def step(self) -> None:
        batch = {name: value.to(self.work.device, non_blocking=True) for name, value in next(self.batches).items()}
        with torch.autocast(self.work.device, torch.bfloat16, enabled=self.work.bf16):
            loss = self.forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def seconds(self, steps: int) -> float:
        began = self.device.wait()
        for _ in range(steps):
            self.step()
        return self.device.wait() - began


class Measured(Exception):  # noqa: N818
    """All windows of a training are measured: it ends here, before it writes its weights."""


@dataclass
class Turns:
    """The collator of the Trainer and of harness, by whose calls their steps are counted and their windows timed."""

    bare: Bare
    steps: int
    rounds: int
    seconds: list[float] = field(default_factory=list)
    bare_seconds: list[float] = field(default_factory=list)
    peak: float = 0.0
    started_after: float = 0.0

    def __post_init__(self) -> None:
        self._calls, self._made_at = 0, self.bare.device.wait()
        self._began: float | None = None

    @property
    def num_steps(self) -> int:
        """What a training needs to come to its last window, with some to spare: batches are drawn ahead."""
        return WARMUP_STEPS + self.rounds * self.steps + 3

    def __call__(self, samples: Sequence[Batch]) -> Batch:
        self._calls += 1
        if self._calls > WARMUP_STEPS and (self._calls - WARMUP_STEPS - 1) % self.steps == 0:
            self._turn()
        return stacked(samples)

    def _turn(self) -> None:
        device = self.bare.device
        now = device.wait()
        if self._began is None:
            self.started_after = now - self._made_at
        else:
            self.seconds.append(now - self._began)
            self.peak = max(self.peak, device.memory("max_memory_allocated"))
        self.bare_seconds.append(self.bare.seconds(self.steps))
        if len(self.seconds) == self.rounds:
            raise Measured
        if device.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        self._began = device.wait()

    @property
    def ratios(self) -> list[float]:
        """How fast each window was, over the bare loop's before and after it."""
        around = [(a + b) / 2 for a, b in pairwise(self.bare_seconds)]
        return [bare / own for bare, own in zip(around, self.seconds, strict=True)]


def options(work: Work, turns: Turns) -> Options:
    """What the Trainer and harness are told, in the names they share."""
    found: Options = {
        "per_device_train_batch_size": work.batch,
        "max_steps": turns.num_steps,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "max_grad_norm": MAX_GRAD_NORM,
        "optim": "adamw_torch_fused",
        "logging_steps": min(turns.steps, LOGGING_STEPS),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": work.bf16,
    }
    if work.compiles:
        found |= {"torch_compile": True, "torch_compile_backend": compile_backend(work.device)}
    if work.recomputes:
        found |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return found | ({"tf32": True} if work.device == "cuda" else {"use_cpu": True})


def with_trainer(work: Work, turns: Turns, folder: str) -> None:
    set_seed(42)
    arguments = TrainingArguments(output_dir=folder, **options(work, turns))
    Trainer(work.model(), arguments, data_collator=turns, train_dataset=work.dataset).train()


def flags(given: Options) -> list[str]:
    return [f"--{name}={json.dumps(v) if isinstance(v, dict) else v}" for name, v in given.items()]


def with_harness(work: Work, turns: Turns, folder: str) -> None:
    said = io.StringIO()
    argv = [f"--task={models.TASK}", f"--output_dir={folder}/run", *flags(options(work, turns))]
    with models.offered(work, turns), contextlib.redirect_stderr(said):
        code = main(argv)
    text = said.getvalue()
    if "Out of memory" in text:
        raise torch.OutOfMemoryError(text.strip().splitlines()[-1])
    if "Preempted" in text or code == 128 + signal.SIGINT:  # it has handlers of its own while it trains
        raise KeyboardInterrupt
    raise RuntimeError(f"harness ended with {code} before all was measured: {text.strip()[-500:]}")


TRAININGS: dict[str, Callable[[Work, Turns, str], None]] = {"Trainer": with_trainer, "ours": with_harness}


@contextlib.contextmanager
def alone(device: Device) -> Iterator[str]:
    """A folder for a training that is to leave nothing to the next one: variables, accelerate's state, memory."""
    environment = dict(os.environ)
    _reset_accelerate()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            yield folder
    finally:
        os.environ.clear()
        os.environ.update(environment)  # the Trainer tells accelerate by them what to compile, and how
        _reset_accelerate()
        device.free()


def _reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(name: str, work: Work, bare: Bare, *, steps: int, rounds: int) -> Turns:
    """Let the Trainer or harness train until all its windows are measured."""
    turns = Turns(bare, steps, rounds)
    with alone(bare.device) as folder, contextlib.suppress(Measured):
        TRAININGS[name](replace(work, num_steps=turns.num_steps + 2), turns, folder)
    if len(turns.seconds) != rounds:
        raise RuntimeError(f"{name} ended after {len(turns.seconds)} of {rounds} windows")
    return turns


def contest(work: Work, device: Device, figures: Figures) -> dict[str, float]:
    """
    Measure all three; returns how fast each is over the bare loop, and `noise`.

    That is the middle distance from 1 of two windows of the bare loop that have one window between them.
    """
    rounds = 3 if device.on_cuda else 2
    device.free()
    torch.compiler.reset()
    began, before = device.wait(), device.memory("memory_allocated")
    bare = Bare(work, device)
    per_token = work.flops_per_token(bare.model)

    def fill_in(name: str, a_step: float, peak: float) -> None:
        speed = work.batch * work.length / a_step
        figures[f"{name} ms"], figures[f"{name} tokens/s"] = rounded(1000 * a_step), rounded(speed)
        if device.peak is not None:
            figures[f"{name} MFU"] = rounded(speed * per_token / device.peak)
            figures["MFU counts"] = "6N + 12LHQT a token"
        if device.on_cuda:
            figures[f"{name} peak GiB"] = rounded(peak / 2**30)

    bare.seconds(WARMUP_STEPS)
    figures |= {"batch": work.batch, "length": work.length, "bare started s": rounded(device.wait() - began)}
    device.free()
    a_step = bare.seconds(3) / 3
    peak, resting = device.memory("max_memory_allocated") - before, device.memory("memory_allocated")
    fill_in("bare", a_step, peak)
    steps = max(3, round(device.seconds / (2 * (2 * rounds + 1)) / a_step))
    figures["steps a window"] = steps
    found: dict[str, Turns] = {}
    for name in TRAININGS:
        found[name] = turns = train(name, work, bare, steps=steps, rounds=rounds)
        figures[f"{name} started s"] = rounded(turns.started_after)
        fill_in(name, statistics.median(turns.seconds) / steps, turns.peak - resting)
        figures[f"{name} / bare"] = rounded(statistics.median(turns.ratios))
    fill_in("bare", statistics.median(s for turns in found.values() for s in turns.bare_seconds) / steps, peak)
    again = [a / b for turns in found.values() for a, b in pairwise(turns.bare_seconds)]
    noise = statistics.median(abs(1 - ratio) for ratio in again)
    figures |= {"bare / bare": rounded(statistics.median(again)), "noise": rounded(noise)}
    ours, trainer = (statistics.median(found[name].ratios) for name in ("ours", "Trainer"))
    figures["ours / Trainer"] = rounded(ours / trainer)
    return {"ours": ours, "Trainer": trainer, "noise": noise}
