"""The parity task with functions for the loop to call, and a model with a further output. `task_args` choose them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
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
        counted = torch.ones_like(input_ids[:, 1:]) if labels is None else labels[:, 1:] != -100
        penalty = found["logits"][:, :-1].float().logsumexp(-1).square()[counted > 0].mean()
        further = {"rows": found["logits"].mean(-1), "nothing": None} if self.training else {}
        return {**found, "penalty": penalty, **further}


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


def complete(model: Any, prompts: Sequence[str]) -> list[str]:
    """Numbers that say which weights the model has; it draws some at random too."""
    torch.rand(3)
    return [f"{prompt} {model.lm_head.weight.detach().double().sum().item()!r}" for prompt in prompts]


ODD: dict[str, Any] = {
    "a number": 0.5,
    "a text": {"name": "0.5"},
    "a vector": {"name": torch.zeros(2)},
    "no text": {3: 0.5},
    "loss": {"loss": 0.5},
    "step": {"step": 3},
    "eval_loss": {"eval_loss": 0.5},
    "train/loss": {"train/loss": 0.5},
    "penalty": {"penalty": 0.5},
    "nan": {"name": float("nan"), "other": np.float32("inf")},
    "types": {
        "half": torch.tensor([0.5], dtype=torch.bfloat16),
        "whole": np.array(3),
        "flag": np.bool_(True),
        "a/b": 1,
    },
}


def no_decay_for_embeddings(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Three groups: with a learning rate of its own, with a weight decay of its own, and with neither."""
    embeddings = [parameter for name, parameter in model.named_parameters() if "wte" in name or "wpe" in name]
    norms = [parameter for name, parameter in model.named_parameters() if ".ln_" in name]
    known = {id(parameter) for parameter in (*embeddings, *norms)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [{"params": rest}, {"params": embeddings, "lr": 5e-4}, {"params": norms, "weight_decay": 0.0}]


def momentum(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)


class HalfSteps(torch.optim.Optimizer):
    """An optimizer that nobody knows: it goes half way against a running mean of the gradients' signs."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.mul_(0.9).add_(parameter.grad.sign(), alpha=0.1)
                parameter.sub_(mean, alpha=group["lr"] / 2)


def of_a_copy(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(deepcopy(model).parameters(), lr=0.05)


def all_say_their_own(model: torch.nn.Module) -> list[dict[str, Any]]:
    return [{"params": [parameter], "lr": 1e-3, "weight_decay": 0.0} for parameter in model.parameters()]


BUILD_OPTIMIZER: dict[str, Any] = {
    "groups": no_decay_for_embeddings,
    "momentum": momentum,
    "unknown": lambda model: HalfSteps(model.parameters(), lr=1e-3),
    "head": lambda model: [{"params": list(model.transformer.ln_f.parameters())}],
    "own": all_say_their_own,
    "copy": of_a_copy,
    "none": lambda _: None,
    "names": lambda _: ["wte"],
    "empty": lambda _: [],
    "closure": lambda model: torch.optim.LBFGS(model.parameters()),
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-3),
}


def perplexity(view: View, metrics: Mapping[str, float]) -> dict[str, Any]:
    """From a metric, from the view, and from a forward pass that the training must not notice."""
    assert not view.model.training
    with torch.no_grad():
        found = view.model(torch.arange(8, device=view.accelerator.device).unsqueeze(0))
    return {
        "perplexity": math.exp(metrics[f"{view.eval_set}_loss"]),
        "trained": 0 if view.optimizer is None else len(view.optimizer.param_groups),
        "probe": found["logits"].mean(),
    }


AFTER_EVALUATION: dict[str, Any] = {
    "perplexity": perplexity,
    "accuracy": lambda _view, _metrics: {"accuracy": 0.5},
    "num_tokens": lambda _view, _metrics: {"num_tokens": 0.5},
    "eval_mine": lambda _view, _metrics: {"eval_mine": 0.5},
    "nothing": lambda _view, _metrics: None,
}
AFTER_STEP = {"third": every_third, "reports": at_reports, "mean": mean_over_ranks, "fails": fails_at_7}


def build(config: TaskConfig) -> Task:
    """`after_step` names a function above or a value of ODD; `logged` are the logged outputs; the rest: parity_task."""
    given = dict(config.task_args or {})
    after_step, logged = given.pop("after_step", None), tuple(given.pop("logged", ()))
    build_optimizer, after_evaluation = given.pop("build_optimizer", None), given.pop("after_evaluation", None)
    builder = faulty_task if "times" in given else parity_task
    task = builder.build(replace(config, task_args=Json(given)))
    if after_step is not None:
        task = replace(task, after_step=AFTER_STEP.get(after_step) or returning(ODD[after_step]))
    if build_optimizer is not None:
        task = replace(task, build_optimizer=BUILD_OPTIMIZER[build_optimizer])
    if after_evaluation is not None:
        task = replace(task, after_evaluation=AFTER_EVALUATION[after_evaluation])
    model = WithPenalty(GPT2Config(**_shape(task.model), bos_token_id=0, eos_token_id=0))
    return replace(task, model=model, logged_outputs=logged, complete=complete)


def _shape(model: Any) -> dict[str, Any]:
    names = ("vocab_size", "n_layer", "n_head", "n_embd", "n_positions", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    return {name: getattr(model.config, name) for name in names}
