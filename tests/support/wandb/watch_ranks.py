"""
Watch on two ranks: `torchrun --nproc_per_node 2 -m tests.support.wandb.watch_ranks FOLDER`.

Rank zero writes FOLDER/found.json: for each way to wrap the model the histograms of the second optimizer step, and
those of one process that computes the whole batch at once; and the graph, before the first step.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from harness.distributed.ranks import settle
from harness.tracking.media.graph import log_graph
from harness.tracking.media.histograms import Watch
from tests.support.wandb.graphs import GraphRun

ACCUMULATION, BATCH_SIZE, NUM_STEPS = 4, 3, 2


class Net(nn.Module):
    """Sizes that two ranks can't share evenly; `one` leaves the second rank without any part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1001, 33)
        self.body = nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 17, dtype=torch.float32))
        self.one = nn.Parameter(torch.ones(1))
        self.constant = nn.Parameter(torch.full((5,), 2.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.body(self.embed(tokens)).square().mean() * self.one.sum() + self.constant.sum()


def steps(model: nn.Module, window: list[torch.Tensor], *, is_main: bool, seen: list[Any]) -> None:
    """Train on the micro-batches of `window` at each step."""
    watch = Watch(model, log="all", log_freq=NUM_STEPS, is_main=is_main)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, NUM_STEPS + 1):
        for i, tokens in enumerate(window):
            waits = i < len(window) - 1 and isinstance(model, DistributedDataParallel)
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(i == len(window) - 1)
            with model.no_sync() if waits else nullcontext():
                (model(tokens) / len(window)).backward()
        if watch.is_due(step):
            seen.append(watch.observe())
        optimizer.step()
        optimizer.zero_grad()


def graph(model: nn.Module, folder: Path) -> Any:
    run = GraphRun(folder)
    log_graph(run, model)
    return run.nodes


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Net()
    batches = torch.randint(0, 1001, (world, ACCUMULATION, BATCH_SIZE, 11))
    own = list(batches[rank])
    sharded = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(sharded.body, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    wrapped = {"ddp": DistributedDataParallel(copy.deepcopy(model)), "fsdp": sharded}
    found: dict[str, Any] = {"world": world, "others": [], "graphs": {}}
    for kind, candidate in wrapped.items():
        seen: list[Any] = []
        found["graphs"][kind] = graph(candidate, folder / str(rank))
        steps(candidate, own, is_main=rank == 0, seen=seen)
        found[kind] = seen
        given: list[Any] = [None] * world
        dist.all_gather_object(given, [len(row) for row in seen])
        found["others"] += given[1:]
    if rank == 0:
        found["whole"], found["micro"] = [], []
        found["graphs"]["whole"] = graph(model, folder / "whole")
        micro = copy.deepcopy(model)
        steps(model, [batches.flatten(0, 2)], is_main=True, seen=found["whole"])
        steps(micro, own[-1:], is_main=True, seen=found["micro"])
        text = json.dumps(found, default=dataclasses.asdict)
        (folder / "found.json").write_text(text, encoding="utf-8")
    dist.barrier()
    settle()  # without it a rank dies now and then in torch's destructor
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
