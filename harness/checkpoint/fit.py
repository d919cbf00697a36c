"""Whether a run may go on from a checkpoint: from its manifest alone, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.checkpoint.arguments import Changes, compare
from harness.checkpoint.flags import CheckpointConfig
from harness.config import Flag
from harness.data.loader import TrainLoader
from harness.data.position import why_other_order
from harness.distributed.zero import LATEST_FILE
from harness.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a run asks of a checkpoint; `optimizer` is None where only a task's function will say which it is."""

    arguments: Mapping[str, Any]
    loader: TrainLoader
    config: CheckpointConfig
    optimizer: str | None
    zero_stage: int


def check_fit(path: Path, shared: Mapping[str, Any], asked: Asked, flags: Mapping[str, Flag]) -> None:
    """Raise ConfigError if the run may not go on from a checkpoint, whose manifest is `shared`, or could not."""
    check_optimizer(path, shared, asked)
    check_arguments(path, shared, asked, flags)


def check_optimizer(path: Path, shared: Mapping[str, Any], asked: Asked) -> None:
    """Raise ConfigError for another optimizer, or other shards of its state."""
    was, now = shared.get("optim", asked.optimizer), asked.optimizer
    interchangeable = {"adamw_torch", "adamw_torch_fused"}
    if now is not None and was != now and not {was, now} <= interchangeable:
        kind = "the optimizer" if " " in f"{was}{now}" else "--optim"
        raise ConfigError(f"{path} was saved with {kind} {was}, not {now}: its state does not fit; give {was}.")
    if asked.zero_stage and asked.config.change_on_resume:
        raise ConfigError("--change_on_resume does not reach DeepSpeed's optimizer: use a launch config without it.")
    stage, num_processes = asked.zero_stage, asked.loader.accelerator.num_processes
    was_stage = shared.get("zero_stage", int((path / LATEST_FILE).is_file()))
    if stage and shared.get("world_size", num_processes) != num_processes:
        raise ConfigError(
            f"{path} was saved by {shared['world_size']} processes, and as many have to read the "
            "shards of DeepSpeed's: launch so many, or start from its weights with --model_name_or_path."
        )
    if was_stage != stage:
        was, now = (f"DeepSpeed ZeRO-{each}" if each else "no DeepSpeed" for each in (was_stage, stage))
        raise ConfigError(f"{path} was saved with {was}, not {now}: use the launch config that it was saved with.")


def check_arguments(path: Path, shared: Mapping[str, Any], asked: Asked, flags: Mapping[str, Flag]) -> None:
    """Raise one ConfigError for all arguments that are not allowed, the order of the data included."""
    found, other_order = changes(shared, asked, flags)
    problems = []
    named = asked.config.change_on_resume or []
    refused = [change for change in found.refused if change.partition(" ")[0] not in named]
    if refused and not asked.config.allow_changed_arguments:
        problems.append(
            f"{path} was saved with other arguments ({', '.join(refused)}), so the run would not go "
            "on as it began: give those it was saved with, or --allow_changed_arguments."
        )
    if other_order and not asked.loader.config.allow_changed_data_order:
        problems.append(
            f"{path} was saved with {other_order}, so the data would come in another order: "
            "use the same values, or give --allow_changed_data_order."
        )
    if problems:
        raise ConfigError(" ".join(problems))


def changes(shared: Mapping[str, Any], asked: Asked, flags: Mapping[str, Flag]) -> tuple[Changes, str]:
    """Return which arguments differ from the checkpoint's, and what changes the order of the data."""
    arguments = shared.get("arguments", {})
    if arguments:  # from before there was a choice
        arguments = {"loss_scaling": "trainer", **arguments}
    found = compare(arguments, asked.arguments, flags)
    return found, why_other_order(shared.get("data", {}), asked.loader.state_dict())
