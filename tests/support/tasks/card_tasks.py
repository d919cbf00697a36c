"""Tasks that bring out what differs on a GPU: the precision of products, overflows of fp16, memory that runs out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from harness.config import Json
from harness.tasks import Task, TaskConfig, quickstart
from tests.support.tasks import parity_task

PRODUCT = "relative error of a product:"
# A batch so many times as large, with what it needs: its logits alone take 8 x 4096 x 32 x 256 x 4 bytes = 1 GiB.
TIMES_TOO_LARGE = 4096
MESSAGE = "CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 79.10 GiB.\nMore text."


def measuring(config: TaskConfig) -> Task:
    """The quickstart; in place of a sample text it shows how exact a product of fp32 matrices is at the end."""
    return replace(
        quickstart.build(config), sample=lambda model: f"{PRODUCT} {_error_of_product(next(model.parameters()).device)}"
    )


def _error_of_product(device: torch.device) -> float:
    """About 1e-7 in fp32 and 4e-4 with TF32, which keeps ten bits of each factor."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    found = (a.to(device) @ b.to(device)).cpu().double()
    return ((found - exact).abs().max() / exact.abs().max()).item()


def without_sample(config: TaskConfig) -> Task:
    """The quickstart, which ends with the training."""
    return replace(quickstart.build(config), sample=None)


def overflowing(config: TaskConfig) -> Task:
    """The parity task; the gradients of the backward passes `at`, counted from 1, are infinite."""
    options = dict(config.task_args or {})
    at = options.pop("at", [])
    task = parity_task.build(replace(config, task_args=Json(options)))
    calls: list[int] = []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.full_like(gradient, float("inf")) if len(calls) in at else gradient

    task.model.transformer.ln_f.weight.register_hook(overflow)  # type: ignore[union-attr, operator]
    return task


def too_large(config: TaskConfig) -> Task:
    """
    The parity task; its micro-batch number `at` does not fit, unless it has fewer than eight samples.

    `raises`: what a device would raise is raised where the batch is made; else the batch is made too large for it.
    """
    options = dict(config.task_args or {})
    at, raises = options.pop("at"), options.pop("raises")
    task = parity_task.build(replace(config, task_args=Json(options)))
    calls: list[int] = []

    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        batch = parity_task.collate(samples)
        calls.append(1)
        if len(calls) != at or len(samples) < 8:
            return batch
        if raises:
            raise torch.OutOfMemoryError(MESSAGE)
        return {name: value.repeat(TIMES_TOO_LARGE, 1) for name, value in batch.items()}

    return replace(task, data_collator=collate)
