"""What is recorded of a run's configuration: model, arguments, launch; plain values, no secrets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.tracking import GeneralTracker

from harness.config import plain
from harness.distributed import sharding
from harness.masking import is_secret_name, masked

# Of the environment nothing else is recorded: it holds keys.
LAUNCH_PREFIXES = ("ACCELERATE_", "SLURM_JOB", "SLURM_RESTART_COUNT")
LAUNCH_VARIABLES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
# The schedules for which the Trainer takes the loss where no metric is named.
GO_BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def run_config(model: torch.nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The run's configuration as the Trainer has it, in JSON types: adapter, model, arguments; these win if given."""
    peft_config: Any = getattr(model, "peft_config", None)
    of_model = plain(model_config(model) or {})
    given = {
        name: f"<{name.upper()}>" if is_secret_name(name) else plain(value)
        for name, value in _derived(arguments).items()
        if value is not None or name not in of_model  # of ours, not the Trainer's: model_type, dtype
    }
    if peft_config is not None:
        given.pop("peft_config", None)  # what the flag says stands in it
    return {
        **({"peft_config": plain(peft_config)} if peft_config is not None else {}),
        **of_model,
        **given,
        "model/num_parameters": num_parameters(model),
    }


def _derived(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with what TrainingArguments makes of those that were not given, where a run shows it."""
    values = dict(arguments)
    for name in ("checkpointing", "checkpointing_kwargs"):
        new, old = f"activation_{name}", f"gradient_{name}"
        if new in values and old in values:
            first = values[old] if values[new] is None else values[new]
            values[new] = values[old] = False if first is None and name == "checkpointing" else first
    if isinstance(debug := values.get("debug"), str):
        values["debug"] = debug.split()
    if values.get("use_cpu"):
        values["dataloader_pin_memory"] = False
    metric = values.get("metric_for_best_model")
    if metric is None and (values.get("load_best_model_at_end") or values.get("lr_scheduler_type") in GO_BY_METRIC):
        metric = values["metric_for_best_model"] = "loss"
    if metric is not None and values.get("greater_is_better") is None:
        values["greater_is_better"] = not metric.endswith("loss")
    return values


def launch_config() -> dict[str, str]:
    """How the processes were started: the launcher's and the scheduler's variables, by an allow-list."""
    return {
        name: masked(value)
        for name, value in sorted(os.environ.items())
        if (name.startswith(LAUNCH_PREFIXES) or name in LAUNCH_VARIABLES) and not is_secret_name(name)
    }


def store_configuration(opened: Iterable[GeneralTracker], values: Mapping[str, Any]) -> None:
    """
    Give the configuration to the trackers of an Accelerator, after `init_trackers(project)` without one.

    W&B keeps it as it is. The others get scalars, the rest as JSON text: TensorBoard raises for others.
    """
    scalars = {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(plain(value))
        for name, value in masked(values).items()
    }
    for tracker in opened:
        tracker.store_init_configuration(dict(values) if tracker.name == "wandb" else scalars)


def model_config(model: torch.nn.Module) -> Mapping[str, Any] | None:
    """The model's own configuration as a mapping, if it has one."""
    config: Any = getattr(model, "config", None)
    return config if config is None or isinstance(config, Mapping) else config.to_dict()


def num_parameters(model: torch.nn.Module) -> int:
    """What `model.num_parameters()` says, or the elements of its parameters."""
    count = sharding.num_parameters(model)
    return sum(sharding.whole_shape(parameter).numel() for parameter in model.parameters()) if count is None else count
