"""
What an observation costs: a step without one, with `wandb.watch`'s, with ours, in turns on the same model.

`python -m tests.benchmarks.watch_time [rounds]` prints the medians in milliseconds and what each adds to a step. Both
give their histograms to an offline run of W&B within the time measured. OMP_NUM_THREADS sets the threads.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping

import torch
import wandb
from transformers import GPT2Config, GPT2LMHeadModel

from harness.tracking.media.histograms import Watch

SHAPE = {"n_layer": 5, "n_head": 4, "n_embd": 256, "vocab_size": 9600, "n_positions": 128}
# wandb.watch counts for itself: it observes every third step.
TURN = ("plain", "ours", "wandb.watch")
ALONE = "observe() alone"


def clock(device: str) -> float:
    """The time when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
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
            if kind == "ours":
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
                if kind == "ours":
                    times[ALONE].append(1000 * alone)
    run.finish()
    return times


def main(rounds: int, folder: str) -> None:
    times = measure(rounds, folder)
    plain = statistics.median(times["plain"])
    print(f"{torch.get_num_threads()} threads, {rounds} rounds")
    for kind, taken in times.items():
        median = statistics.median(taken)
        more = median if kind == ALONE else median - plain
        print(f"{kind:16} {median:7.1f} ms ({min(taken):.1f}-{max(taken):.1f})  adds {more:6.1f} ms")
    added = {kind: statistics.median(times[kind]) - plain for kind in TURN}
    print(f"wandb.watch adds {added['wandb.watch'] / added['ours']:.1f} times what ours adds")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as scratch:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 15, scratch)
