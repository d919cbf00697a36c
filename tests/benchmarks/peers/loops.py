"""
A training step by every loop on the same model and batches, without tracking: a small model and a larger one.

Bare torch, bare Accelerate, Lightning Fabric and Trainer, transformers.Trainer, TRL's SFTTrainer and harness, each as
its documentation shows it (`ways.py`). A step lasts from one call of the collator to the next.
"""

from __future__ import annotations

from functools import partial

import torch

from tests.benchmarks.contest import Bound, Result, alternate, needs
from tests.benchmarks.peers.ways import WAYS, milliseconds
from tests.benchmarks.peers.work import LARGE, SMALL, Work

BASE = "bare torch"


def measure(device: str, repeats: int) -> list[Result]:
    needs("lightning", "trl")
    torch.set_num_threads(1)  # threads of small products wait for each other, the more on a busy machine
    small = Bound(relation="<=", limit=1.0, over="Trainer")
    large = Bound(relation="<=", limit=1.02, over=BASE)
    found = []
    works = ("small", Work(SMALL, steps=140, warmup=20), small), ("larger", Work(LARGE, steps=15), large)
    for size, work, bound in works:
        ways = {name: partial(milliseconds, name, work) for name in WAYS}
        figures = alternate(ways, repeats=repeats, warmup=1)
        what = f"step of a {size} model"
        found.append(Result(what=what, unit="ms", figures=figures, base=BASE, bounds=[bound], setting=work.setting))
    return found
