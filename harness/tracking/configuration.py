"""What is recorded of a run's configuration: model, arguments, launch; plain values, no secrets."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from accelerate.tracking import GeneralTracker

from harness import zero

SECRET_SUFFIXES = ("_token", "api_key")
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
        name: f"<{name.upper()}>" if is_secret(name) else plain(value)
        for name, value in _derived(arguments).items()
        if value is not None or name not in of_model  # of ours, not the Trainer's: model_type, dtype
    }
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
        name: value
        for name, value in sorted(os.environ.items())
        if (name.startswith(LAUNCH_PREFIXES) or name in LAUNCH_VARIABLES) and not is_secret(name.lower())
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
    count = zero.num_parameters(model)
    return sum(zero.whole_shape(parameter).numel() for parameter in model.parameters()) if count is None else count


def is_secret(name: str) -> bool:
    """Whether a value of this name must not be recorded."""
    return name == "token" or name.endswith(SECRET_SUFFIXES)


def masked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without secrets. A text like <image> is a model's special token, or masked already."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result[name] = masked(value)
        elif isinstance(value, str) and is_secret(str(name)) and not (value[:1] == "<" and value[-1:] == ">"):
            result[name] = f"<{name.upper()}>"
        else:
            result[name] = value
    return result


def masked_arguments(argv: Sequence[str]) -> list[str]:
    """A command line without the values of secret flags: wandb records it."""
    result: list[str] = []
    hides_next = False
    for token in argv:
        flag, equals, _ = token.partition("=")
        secret = flag.startswith("--") and is_secret(flag[2:].replace("-", "_").lower())
        result.append("<SECRET>" if hides_next else f"{flag}=<SECRET>" if secret and equals else token)
        hides_next = secret and not equals
    return result


def plain(value: Any) -> Any:
    """The value in JSON types."""
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    return str(value)
