"""
What an observation of all weights and gradients adds to a step: `wandb.watch`'s and ours, in turns on the same model.

Both give their histograms to an offline run of W&B within the time measured. What is shown is a step with an
observation without the step right before it that had none; that the histograms are equal is for
tests/tracking/media/test_histograms.py.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping

import torch
import wandb
from transformers import GPT2Config, GPT2LMHeadModel

from harness.tracking.media.histograms import Watch
from tests.benchmarks.contest import OURS, Bound, Result

DEVICES = ("cpu", "cuda")
SHAPE = {"n_layer": 5, "n_head": 4, "n_embd": 256, "vocab_size": 9600, "n_positions": 128}
THEIRS = "wandb.watch"
# wandb.watch counts for itself: it observes every third step.
TURN = ("plain", OURS, THEIRS)
ALONE = "observe() alone"
TIMES = 3  # observations in a repeat


def measure(device: str, repeats: int) -> list[Result]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        times = observed(repeats * TIMES, folder, device=device)
    added = {
        name: [taken - plain for taken, plain in zip(times[name], times["plain"], strict=True)]
        for name in (THEIRS, OURS)
    }
    bound = Bound(relation="<=", limit=0.25, over=THEIRS)
    setting = f"GPT-2 with 6.5 M parameters, {torch.get_num_threads()} thread" if device == "cpu" else "on the GPU"
    what = "what an observation adds to a step"
    return [Result(what=what, unit="ms", figures=added, base=THEIRS, bounds=[bound], setting=setting)]


def clock(device: str) -> float:
    """The time when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def observed(
    rounds: int, folder: str, *, shape: Mapping[str, int] = SHAPE, device: str = "cpu", pause: float = 0.3
) -> dict[str, list[float]]:
    """Milliseconds of each step, by what observed it, and of our observation alone; a round more warms up."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
        batch = torch.randint(0, shape["vocab_size"], (2, 64))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(x_disable_stats=True, silent=True))
    run.watch(model, log="all", log_freq=len(TURN))
    watch = Watch(model, log="all", log_freq=1, is_main=True)
    times: dict[str, list[float]] = {kind: [] for kind in (*TURN, ALONE)}
    for turn in range(rounds + 1):
        for kind in TURN:
            begin = clock(device)
            model(input_ids=batch, labels=batch).loss.backward()
            if kind == OURS:
                start = clock(device)
                found = watch.observe()
                alone = clock(device) - start
                rows = {key: wandb.Histogram(np_histogram=(h.values, h.bins)) for key, h in found.items()}
                run.log(rows, commit=False)
            optimizer.step()
            optimizer.zero_grad()
            taken = clock(device) - begin
            run.log({"loss": 0.0})
            time.sleep(pause)  # wandb's service works on the row in the background
            if turn:
                times[kind].append(1000 * taken)
                if kind == OURS:
                    times[ALONE].append(1000 * alone)
    run.finish()
    return times
