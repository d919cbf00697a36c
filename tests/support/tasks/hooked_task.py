"""The parity task with functions for the loop to call, and a model with a further output. `task_args` choose them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from harness.config import Json
from harness.tasks import Task, TaskConfig, View
from tests.support.tasks import faulty_task, parity_task

EVERY = 3


class WithPenalty(GPT2LMHeadModel):
    """Returns beside the loss a penalty, which a router's loss stands for, and outputs that are no scalars."""

    # Named, so that no column is taken for unused.
    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> dict[str, Any]:
        found = dict(super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs))
        penalty = found["logits"].float().logsumexp(-1).square().mean()
        return {**found, "penalty": penalty, "rows": found["logits"].mean(-1), "nothing": None}


def every_third(view: View) -> dict[str, Any] | None:
    """A norm on the device, and counts in types of numpy and Python."""
    if view.global_step % EVERY:
        return None
    squares = [parameter.detach().square().sum() for parameter in view.bare_model.parameters()]
    tokens = sum(batch["input_ids"].numel() for batch in view.batches)
    return {"weight_norm": torch.stack(squares).sum().sqrt(), "of_step": np.int64(view.global_step), "tokens": tokens}


def at_reports(view: View) -> dict[str, Any] | None:
    return {"twice": 2.0 * view.global_step} if view.log_due else None


def mean_over_ranks(view: View) -> dict[str, Any]:
    """A collective: each rank has other batches, and only the mean is the same on all."""
    length = torch.tensor(float(view.batches[0]["input_ids"].shape[1]), device=view.accelerator.device)
    return {"mean_length": view.accelerator.reduce(length, "mean"), "ranks": view.num_processes}


def fails_at_7(view: View) -> None:
    if view.global_step == 7:
        raise KeyError("a bug in the hook")


def returning(value: Any) -> Any:
    """A function that returns this value at each step."""

    def return_it(view: View) -> Any:
        return value

    return return_it


ODD: dict[str, Any] = {
    "a number": 0.5,
    "a text": {"name": "0.5"},
    "a vector": {"name": torch.zeros(1)},
    "no text": {3: 0.5},
    "loss": {"loss": 0.5},
    "step": {"step": 3},
    "eval_loss": {"eval_loss": 0.5},
    "train/loss": {"train/loss": 0.5},
    "penalty": {"penalty": 0.5},
    "nan": {"name": float("nan"), "other": np.float32("inf")},
    "types": {"half": torch.tensor(0.5, dtype=torch.bfloat16), "whole": np.array(3), "flag": np.bool_(True), "a/b": 1},
}
AFTER_STEP = {"third": every_third, "reports": at_reports, "mean": mean_over_ranks, "fails": fails_at_7}


def build(config: TaskConfig) -> Task:
    """`after_step` names a function above or a value of ODD; `logged` are the logged outputs; the rest: parity_task."""
    given = dict(config.task_args or {})
    after_step, logged = given.pop("after_step", None), tuple(given.pop("logged", ()))
    builder = faulty_task if "times" in given else parity_task
    task = builder.build(replace(config, task_args=Json(given)))
    if after_step is not None:
        task = replace(task, after_step=AFTER_STEP.get(after_step) or returning(ODD[after_step]))
    model = WithPenalty(GPT2Config(**_shape(task.model), bos_token_id=0, eos_token_id=0))
    return replace(task, model=model, logged_outputs=logged)


def _shape(model: Any) -> dict[str, Any]:
    names = ("vocab_size", "n_layer", "n_head", "n_embd", "n_positions", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    return {name: getattr(model.config, name) for name in names}
