"""The loss of a micro-batch is that of the parts that it is split into, whatever its model does with its items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from harness.config import Json
from harness.fitting.splitting import Splitting
from harness.tasks import TaskConfig
from harness.training.flags import ModelingConfig
from harness.training.loss import Loss
from harness.training.weighing import Repeated
from tests.support.fitting.limited_task import Limited, Samples
from tests.support.fitting.limited_task import collate as collate_points
from tests.support.tasks import parity_task

TASK = "tests.support.tasks.parity_task:build"
NOT_USED: Any = None


def next_tokens(outputs: Any, labels: torch.Tensor, reduction: str) -> torch.Tensor:
    return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


def mean_loss(outputs: Any, labels: Any, _: Any) -> torch.Tensor:
    return next_tokens(outputs, labels, "mean")


def mixed_loss(outputs: Any, labels: Any, num_items: Any) -> torch.Tensor:
    return next_tokens(outputs, labels, "sum") / num_items + 0.1 * outputs.logits.pow(2).mean()


def texts() -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """GPT-2 and two micro-batches of a step, of unequal lengths and with labels that don't count."""
    task = parity_task.build(TaskConfig(task=TASK, task_args=Json({"dropout": 0.0})))
    samples = [dict(task.train_dataset[i]) for i in range(12)]
    for sample in samples:  # by which tokens a new model weighs can't be told from its losses: here it is the same
        sample["labels"] = torch.cat([torch.tensor([-100]), sample["labels"][1:]])
    samples[5] = {**samples[5], "labels": torch.full_like(samples[5]["labels"], -100)}
    return task.model, [parity_task.collate(samples[:7]), parity_task.collate(samples[7:])]


def points() -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    samples = Samples().samples
    return Limited(), [collate_points(list(samples[:7])), collate_points(list(samples[7:12]))]


@pytest.mark.parametrize(
    ("made", "own"),
    [(texts, None), (texts, mean_loss), (texts, mixed_loss), (points, None)],
    ids=["sum of tokens", "mean of tokens", "both", "mean of samples"],
)
@pytest.mark.parametrize("most_rows", [1, 3])
def test_the_parts_of_a_micro_batch_have_its_loss_and_gradient(
    made: Callable[[], tuple[torch.nn.Module, list[dict[str, Any]]]], own: Any, most_rows: int
) -> None:
    torch.manual_seed(0)
    model, window = made()
    loss = Loss(model, ModelingConfig(), Accelerator(cpu=True), own)
    splitting = Splitting(loss, NOT_USED, NOT_USED, NOT_USED, batch_size=7, is_on=True)
    shares = loss.shares(model, window)
    whole = splitting.parts(window, shares)
    splitting.most_rows = most_rows
    parts = splitting.parts(window, shares)
    assert (len(whole), len(parts)) == (2, 12 if most_rows == 1 else 5)
    assert float(sum(share.part for _, share in parts)) == pytest.approx(1)

    def made_of(split: list[Any]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = 0.0
        for batch, share in split:
            value, _ = loss(model, batch, share)
            value.backward()  # type: ignore[no-untyped-call]
            total += value.item()
        grads = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
        return total, torch.cat(grads)

    (expected, of_whole), (found, of_parts) = made_of(whole), made_of(parts)
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(of_parts, of_whole, rtol=1e-4, atol=1e-6)


def test_parts_of_a_batch_that_weighs_nothing_weigh_nothing() -> None:
    model, window = points()
    loss = Loss(model, ModelingConfig(), Accelerator(cpu=True), None)
    splitting = Splitting(loss, NOT_USED, NOT_USED, NOT_USED, batch_size=7, is_on=True)
    splitting.most_rows = 2
    step = [window[0], Repeated(window[1])]
    parts = splitting.parts(step, loss.shares(model, step))
    assert [isinstance(batch, Repeated) for batch, _ in parts] == [False] * 4 + [True] * 3
    assert all(loss(model, batch, share)[0].item() == 0 for batch, share in parts[4:])
