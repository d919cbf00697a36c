"""A network whose passes take much memory a sample, in a process that may not have much more than it has."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.tasks import Task, TaskConfig
from tests.support.fitting.limited_task import WIDTH, Samples, collate

MIB = 2**20
A_SAMPLE = 16 * MIB  # bytes that its forward pass keeps for the backward pass


class Hungry(nn.Module):
    """Keeps A_SAMPLE bytes for each sample of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor | None]:
        logits = self.layer(x)
        if self.training:
            wide = logits.sum(1, keepdim=True).expand(len(x), A_SAMPLE // 4)
            logits = logits + 0 * wide.exp().mean(1, keepdim=True)  # exp keeps what it has computed
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def build(config: TaskConfig) -> Task:
    """With `room` in task_args the process may map so many MiB more than when this is called."""
    room: Any = (config.task_args or {}).get("room")
    if room is not None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room * MIB, resource.RLIM_INFINITY))
    return Task(model=Hungry(), train_dataset=Samples(), data_collator=collate)
