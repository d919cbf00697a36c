"""
A small model's step with W&B offline, reported at every step, by every loop that can.

The same loops as in `loops`; Lightning Fabric has no W&B of its own.
"""

from __future__ import annotations

from functools import partial

import torch

from tests.benchmarks.contest import Bound, Result, alternate, needs
from tests.benchmarks.peers.ways import WAYS, milliseconds
from tests.benchmarks.peers.work import SMALL, Work

BASE = "bare torch"


def measure(device: str, repeats: int) -> list[Result]:
    needs("lightning", "trl")
    torch.set_num_threads(1)
    work = Work(SMALL, steps=140, warmup=20, logging_steps=1, is_tracked=True)
    ways = {name: partial(milliseconds, name, work) for name in WAYS if name != "Lightning Fabric"}
    figures = alternate(ways, repeats=repeats, warmup=1)
    bound = Bound(relation="<=", limit=0.95, over="Trainer")
    what = "step of a small model, logged to W&B"
    return [Result(what=what, unit="ms", figures=figures, base=BASE, bounds=[bound], setting=work.setting)]
