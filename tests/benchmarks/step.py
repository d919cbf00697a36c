"""
What a step of ours takes beside a bare torch loop and the Trainer, in windows that take turns; by the tensors too.

The bare loop waits in memory while another trains, and makes as many steps between any two windows of it: see
`gpu/contest.py`. What is shown of a contestant is its window over the bare loop's around it, times the bare loop's
middle. Tracked loops log each step to an offline run of W&B.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from transformers import PretrainedConfig, Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import CausalLMOutput

from harness.train import main
from tests.benchmarks.contest import OURS, Bound, Curve, Result, alternate
from tests.benchmarks.gpu import models
from tests.benchmarks.gpu.contest import Bare, Measured, Turns, alone, flags, options
from tests.benchmarks.gpu.models import Options, Work, offered
from tests.benchmarks.gpu.outcomes import Device

DEVICES = ("cpu", "cuda")
BASE, TRAINER = "bare torch", "Trainer"
SMALL = {**models.SMALL_GPT2, "n_positions": 48}  # about 10 ms on a core
LARGE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1024, "n_positions": 128}  # about 100
TRACKED: Options = {"report_to": "wandb", "logging_steps": 1}
SECONDS, WINDOWS = 0.5, 2  # of a window; of a training in a round
SHORTER = 0.25  # seconds of a window where sizes are many
SIZES = (10, 100, 1000, 3000)  # tensors of a model
LINEAR = 1.1


def measure(device: str, repeats: int) -> list[Result | Curve]:
    if device == "cpu":
        torch.set_num_threads(1)  # threads of small products wait for each other, the more on a busy machine
    os.environ["WANDB_SILENT"] = "true"
    logging.disable(logging.WARNING)
    faster = Bound(relation="<=", limit=1.0, over=TRAINER)
    tracked = Bound(relation="<=", limit=0.95, over=TRAINER)
    small = work_of(models.gpt2(SMALL), device)
    return [
        contest("step of a small model", small, repeats, bounds=[faster]),
        contest("step of a small model, each logged to W&B", small, repeats, bounds=[tracked], more=TRACKED),
        contest(
            "step of a larger model",
            work_of(models.gpt2(LARGE), device),
            repeats,
            ways={OURS: train_ours},
            bounds=[Bound(relation="<=", limit=1.02, over=BASE)],
        ),
        *by_tensors(device, repeats),
    ]


def work_of(config: PretrainedConfig, device: str) -> Work:
    return Work(config, batch=8, length=config.n_positions, device=device, bf16=False)


def train_ours(work: Work, turns: Turns, folder: str, given: Options) -> None:
    with offered(work, turns):
        main([f"--task={models.TASK}", f"--output_dir={folder}/run", *flags(given)])


def train_trainer(work: Work, turns: Turns, folder: str, given: Options) -> None:
    set_seed(42)
    arguments = TrainingArguments(output_dir=folder, **given)
    try:
        Trainer(work.model(), arguments, data_collator=turns, train_dataset=work.dataset).train()
    finally:
        if given["report_to"] == "wandb":
            import wandb

            wandb.finish()


Way = Callable[[Work, Turns, str, Options], None]
WAYS: dict[str, Way] = {OURS: train_ours, TRAINER: train_trainer}


def windows(work: Work, bare: Bare, way: Way, more: Options) -> Turns:
    """The windows of a training, and of the bare loop around them."""
    turns = Turns(bare, steps_of(bare), WINDOWS)
    given = {**options(work, turns), "logging_steps": 500, **more}
    with alone(bare.device) as folder, contextlib.suppress(Measured), contextlib.redirect_stderr(io.StringIO()):
        os.environ["WANDB_DIR"] = folder
        way(replace(work, num_steps=turns.num_steps + 2), turns, folder, given)
    if len(turns.seconds) != WINDOWS:
        raise RuntimeError(f"a training ended after {len(turns.seconds)} of {WINDOWS} windows")
    return turns


def steps_of(bare: Bare) -> int:
    return max(3, round(bare.device.seconds / (bare.seconds(5) / 5)))


def contest(
    what: str,
    work: Work,
    repeats: int,
    *,
    bounds: list[Bound],
    ways: dict[str, Way] = WAYS,
    more: Options | None = None,
    seconds: float = SECONDS,
) -> Result:
    """Milliseconds of a step by contestant, from windows of so many seconds."""
    bare = Bare(work, Device(work.device, seconds))
    bare.seconds(5)
    milliseconds = 1000 * statistics.median(bare.seconds(steps_of(bare)) / steps_of(bare) for _ in range(3))
    around: list[tuple[float, float]] = []

    def figure(way: Way) -> float:
        turns = windows(work, bare, way, more or {})
        around.extend((1000 * a / turns.steps, 1000 * b / turns.steps) for a, b in pairwise(turns.bare_seconds))
        return milliseconds / statistics.mean(turns.ratios)

    found = alternate({name: partial(figure, way) for name, way in ways.items()}, repeats=repeats, again=False)
    figures = {BASE: [milliseconds] * repeats, **found}
    again = [milliseconds * b / a for a, b in around]
    figures[f"{BASE} again"] = [statistics.median(again[i::repeats]) for i in range(repeats)]
    count = sum(each.numel() for each in bare.model.parameters())
    setting = f"GPT-2 with {count / 1e6:.2g} M parameters, batch {work.batch} x {work.length}, {_where(work.device)}"
    return Result(what=what, unit="ms", figures=figures, base=BASE, bounds=bounds, setting=setting)


def _where(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} thread"


class ManyTensors(torch.nn.Module):
    """A model of so many small tensors, whose number decides how long a step takes."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.scales = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(64)) for _ in range(count))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        values = input_ids.float()
        for scale in self.scales:
            values = values * scale
        return CausalLMOutput(loss=(values - labels).square().mean(), logits=values)


class TensorsWork(Work):
    """Random tokens for a model of as many tensors as the configuration says layers."""

    def model(self) -> Any:
        return ManyTensors(self.config.num_hidden_layers)


def by_tensors(device: str, repeats: int) -> list[Curve]:
    """Milliseconds of a step, and those that ours and the Trainer's take more than the bare loop's."""
    steps: dict[str, dict[float, list[float]]] = {BASE: {}, OURS: {}, TRAINER: {}}
    more: dict[str, dict[float, list[float]]] = {OURS: {}, TRAINER: {}}
    for size in SIZES:
        config = models.gpt2({**SMALL, "n_layer": size, "n_positions": 64})
        work = TensorsWork(config, batch=8, length=64, device=device, bf16=False)
        found = contest("", work, repeats, bounds=[], seconds=SHORTER)
        for name in steps:
            steps[name][size] = list(found.figures[name])
        for name in more:
            # A clock's noise may make it nothing, of which no power can be told.
            more[name][size] = [max(each - found.median(BASE), 0.01) for each in found.figures[name]]
    setting = f"tensors of 64 elements, {_where(device)}"
    return [
        Curve(what="a step", unit="ms", size="tensors", figures=steps, most_growth=LINEAR, setting=setting),
        Curve(
            what="what a step takes more than bare torch's", unit="ms", size="tensors", figures=more, setting=setting
        ),
    ]
