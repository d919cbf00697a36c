"""
How long the graph of a large model delays a training's start, by the number of its modules.

Models of experts, no two of which are printed alike, so that nothing is shortened; W&B's run is offline.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from harness.tracking.media.graph import log_graph
from tests.benchmarks.contest import OURS, Curve

SHAPES = ((12, 20), (24, 50), (36, 140))  # layers, experts in each
LINEAR = 1.1


class Expert(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(2, number + 1), nn.Linear(number + 1, 2), nn.ReLU()


class Block(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.router, self.norm = nn.Linear(2, count), nn.LayerNorm(2)
        self.experts = nn.ModuleList(Expert(i) for i in range(count))


class Body(nn.Module):
    def __init__(self, num_layers: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"layer{i}": Block(count) for i in range(num_layers)})


class Model(nn.Module):
    def __init__(self, num_layers: int, count: int) -> None:
        super().__init__()
        self.model, self.head = Body(num_layers, count), nn.Linear(2, 2)


def measure(device: str, repeats: int) -> list[Curve]:
    figures: dict[float, list[float]] = {}
    for shape in SHAPES:
        with torch.device("meta"):
            model = Model(*shape)
        count = sum(1 for _ in model.modules())
        figures[count] = [a_graph(model) for _ in range(repeats)]
    return [Curve(what="the graph in W&B", unit="ms", size="modules", figures={OURS: figures}, most_growth=LINEAR)]


def a_graph(model: nn.Module) -> float:
    with offline_run() as run:
        began = time.perf_counter()
        log_graph(run, model)
        return 1000 * (time.perf_counter() - began)


@contextmanager
def offline_run() -> Iterator[Any]:
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        settings = wandb.Settings(x_disable_stats=True, silent=True)
        run = wandb.init(mode="offline", dir=folder, settings=settings)
        yield run
        run.finish()
