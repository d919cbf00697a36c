"""A task whose second rank draws the batch of a step only once the first one is in the forward pass of that step."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from harness.tasks import Task, TaskConfig

SECONDS = 60.0  # as good as for ever: who has to wait so long waits for a rank that waits for it
LEARNED = 2  # the first step has collectives of its own, in which the ranks learn how the model's loss is divided


class Model(torch.nn.Module):
    """Its loss is a sum over the labels, divided within its forward pass as Transformers' decoders do."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 8)
        self.file, self.passes = file, 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self.passes += 1
            if os.environ.get("RANK") == "0":
                written = self.file.with_suffix(".new")
                written.write_text(f"{self.passes}", encoding="utf-8")
                written.replace(self.file)
        scores = self.layer(x)
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
        items = labels.numel() if num_items_in_batch is None else num_items_in_batch
        return {"loss": loss / items, "logits": scores}


class Late:
    """The collator. Batch j, counted from 0, is drawn right before step j; it is one batch ahead."""

    def __init__(self, file: Path) -> None:
        self.file, self.drawn = file, 0

    def __call__(self, samples: list[Any]) -> Any:
        step, self.drawn = self.drawn, self.drawn + 1
        if os.environ.get("RANK") == "1" and step > LEARNED:
            self._wait(step)
        return default_collate(samples)

    def _wait(self, step: int) -> None:
        ends_at = time.monotonic() + SECONDS
        while not (self.file.exists() and int(self.file.read_text(encoding="utf-8")) >= step):
            if time.monotonic() > ends_at:
                raise RuntimeError(f"rank zero does not come to the forward pass of step {step}")
            time.sleep(0.01)


def build(config: TaskConfig) -> Task:
    file = Path((config.task_args or {})["file"])
    torch.manual_seed(0)
    samples = [{"x": torch.randn(3, 4), "labels": torch.randint(0, 8, (3,))} for _ in range(64)]
    return Task(model=Model(file), train_dataset=samples, data_collator=Late(file))
