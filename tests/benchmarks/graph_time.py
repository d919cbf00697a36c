"""
How long the graph of a large model delays a training: `python -m tests.benchmarks.graph_time [DIR]`.

Models of experts, no two of which are printed alike, so that nothing is shortened. Each line: modules, parameters,
milliseconds until W&B's run has the graph, the size of its file in MB.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

from harness.tracking.media.graph import log_graph


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


def main(folder: str = ".") -> None:
    import wandb

    for num_layers, count in ((12, 20), (24, 50), (36, 140)):
        with torch.device("meta"):
            model = Model(num_layers, count)
        settings = wandb.Settings(x_disable_stats=True, silent=True)
        run = wandb.init(mode="offline", dir=folder, settings=settings)
        began = time.perf_counter()
        log_graph(run, model)
        taken = 1000 * (time.perf_counter() - began)
        (file,) = Path(run.dir).rglob("*.graph.json")
        size = file.stat().st_size / 1e6
        counts = sum(1 for _ in model.modules()), sum(1 for _ in model.parameters())
        print(f"modules {counts[0]}  parameters {counts[1]}  ms {taken:.1f}  MB {size:.2f}", flush=True)
        run.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
