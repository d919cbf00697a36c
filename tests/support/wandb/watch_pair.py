"""
The same steps watched by wandb.watch and by ours, in one process.

`python -m tests.support.wandb.watch_pair FOLDER [DEVICE]`: the rows of wandb.watch go to FOLDER/rows, ours to
FOLDER/ours.json; without a device the graphs to FOLDER/graph-theirs and graph-ours.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
import wandb
from torch import nn

from harness.tracking.media.graph import log_graph
from harness.tracking.media.histograms import Watch
from tests.support.wandb.file import read_all

LOG_FREQ, NUM_STEPS = 2, 4
Rows = list[dict[str, dict[str, list[float]]]]


class Odd(nn.Module):
    """Tensors of every kind, named for what is odd about the values (v_) or about the gradients (g_)."""

    def __init__(self) -> None:
        super().__init__()
        nan, inf = float("nan"), float("inf")
        self.body = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))
        self.sparse = nn.Embedding(50, 8, sparse=True)
        self.sparse_positive = nn.Embedding(20, 8, sparse=True)  # its range doesn't hold the zeros it leaves out
        self.sparse_full = nn.Embedding(1, 3, sparse=True)  # no zeros are left out
        self.dense = nn.Embedding(9600, 64)  # more than a block, nearly all of the gradient zero
        self.tied = nn.Linear(64, 9600, bias=False)
        self.tied.weight = self.dense.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        for dtype in (torch.bfloat16, torch.float16):
            self.register_parameter(f"v_{str(dtype)[6:]}", nn.Parameter(torch.randn(30, 30, dtype=dtype)))
        self.v_float64 = nn.Parameter(1 + 1e-9 * torch.randn(30, 30, dtype=torch.float64))  # all 1 in float32
        self.v_negative = nn.Parameter(-torch.rand(100) - 1)
        self.v_constant = nn.Parameter(torch.full((7,), 0.1))
        self.v_some_finite = nn.Parameter(torch.tensor([nan, 1.0, inf, -inf, 2.0, 5.0]), requires_grad=False)
        self.v_one_finite = nn.Parameter(torch.tensor([nan, 1.5, inf]), requires_grad=False)
        self.v_none_finite = nn.Parameter(torch.tensor([nan, inf]), requires_grad=False)
        self.v_empty = nn.Parameter(torch.empty(0, 3))
        self.v_scalar = nn.Parameter(torch.tensor(0.5))
        self.v_strided = nn.Parameter(torch.randn(6, 4, 5).permute(2, 0, 1))
        self.v_tiny = nn.Parameter(torch.randn(100) * 1e-30)
        self.g_some_finite = nn.Parameter(torch.zeros(6))
        self.g_none_finite = nn.Parameter(torch.zeros(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        loss = self.body(self.sparse(tokens)).square().mean() + self.sparse_positive(tokens % 5).sum()
        loss = loss + self.sparse_full(tokens * 0).square().sum()
        loss = loss + self.tied(self.dense(tokens[:, :2])).logsumexp(-1).mean()
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("v_") and parameter.requires_grad:
                loss = loss + (parameter.float().square().sum() if name != "v_constant" else parameter.sum())
        loss = loss + (self.g_some_finite * loss.new_tensor([1.0, float("nan"), float("inf"), 3.0, -2.0, 0.0])).sum()
        return loss + (self.g_none_finite * loss.new_tensor([float("nan"), float("-inf")])).sum()


class Layers(nn.Module):
    """Containers within containers, a layer called twice, one with two names, one that returns several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 2)
        shared = nn.ReLU()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), shared), nn.Identity()])
        self.heads = nn.ModuleDict({"a": nn.LSTM(8, 6, batch_first=True), "shared": shared})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[1](self.blocks[0](self.blocks[0](x)))
        return self.last(self.heads["shared"](self.heads["a"](x)[0]))


def watch(folder: Path, device: str) -> None:
    torch.manual_seed(0)
    model = Odd().to(device)
    (folder / "rows").mkdir()
    run = wandb.init(dir=folder / "rows")
    run.watch(model, log="all", log_freq=LOG_FREQ)
    ours = Watch(model, log="all", log_freq=LOG_FREQ, is_main=True)
    rows = []
    for step in range(1, NUM_STEPS + 1):
        model(torch.randint(0, 50, (4, 6)).to(device)).backward()
        found = ours.observe() if ours.is_due(step) else {}
        rows.append({key: dataclasses.asdict(histogram) for key, histogram in found.items()})
        run.log({"loss": 1.0})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None and parameter.requires_grad:
                    parameter -= 0.1 * parameter.grad.to_dense().nan_to_num(0, 0, 0)
        model.zero_grad()
    run.finish()
    (folder / "ours.json").write_text(json.dumps(rows), encoding="utf-8")


def graphs(folder: Path) -> None:
    for kind in ("theirs", "ours"):
        (folder / f"graph-{kind}").mkdir()
        run = wandb.init(dir=folder / f"graph-{kind}")
        layers = Layers()
        if kind == "ours":
            log_graph(run, layers, with_shapes=True)
        else:
            run.watch(layers, log=None, log_graph=True, idx=0)
        for batch_size in (3, 5):
            layers(torch.randn(batch_size, 7, 8))
        run.finish()


def rows_of_wandb(folder: Path) -> Rows:
    """W&B keeps the parts of a histogram under keys of their own, in no order."""
    rows: Rows = []
    for row in read_all(folder / "rows")[0].rows:
        rows.append({})
        for key, value in row.items():
            name, _, part = key.rpartition(".")
            if part in ("values", "bins"):
                rows[-1].setdefault(name, {})[part] = value
    return rows


def main(folder: Path, device: str | None = None) -> None:
    watch(folder, device or "cpu")
    if device is None:
        graphs(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
