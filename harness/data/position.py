"""Convert a saved position in the data to the batch size and the number of processes of this run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.data.loader import RankBatches

Position = Mapping[str, Any]
# Their product is the global batch, the samples of an optimizer step.
LAYOUT = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")
# With batches by tokens a step has so many batches, whatever is in them, out of so many of an epoch.
TOKENS, TOKEN_BATCHES = "max_tokens_per_batch", "token_batches"
WHERE = ("epoch", "batches")


def describe_change(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between the values that a position was counted in and today's; empty if nothing does."""
    return ", ".join(
        f"{name} {saved[name]} (now {now[name]})"
        for name in now
        if name not in WHERE and name in saved and saved[name] != now[name]
    )


def has_other_layout(saved: Position, now: Position) -> bool:
    """Whether the same steps are made of micro-batches of another size, or on another number of processes."""
    return any(saved[name] != now[name] for name in LAYOUT)


def why_other_order(saved: Position, now: Position) -> str:
    """Return what makes the samples come in other steps than in the saved run; empty if nothing does."""
    if not saved:  # a Trainer's checkpoint
        return ""
    for name in (TOKENS, TOKEN_BATCHES):
        if bool(saved.get(name)) != bool(now.get(name)):
            return f"{name} {saved.get(name)} (now {now.get(name)})"
    reasons = []
    if _global_batch(saved) != _global_batch(now):
        reasons.append(f"a global batch of {_describe_batch(saved)} (now {_describe_batch(now)})")
    compared = {
        name: value
        for name, value in now.items()
        if name not in (*LAYOUT, *WHERE) and value is not None and saved.get(name) is not None
    }
    if change := describe_change(saved, compared):
        reasons.append(change)
    if not reasons and has_other_layout(saved, now):
        reasons += _why_layout_matters(saved, now)
    return ", ".join(reasons)


def _why_layout_matters(saved: Position, now: Position) -> list[str]:
    change = describe_change(saved, {name: now[name] for name in LAYOUT})
    if now["train_sampling_strategy"] == "group_by_length":
        # Groups depend on the device's samples, and on a generator that dropout also uses.
        return [f"train_sampling_strategy group_by_length and {change}"]
    if now["num_samples"] is None and now["dataloader_num_workers"]:
        return [f"a stream read by {now['dataloader_num_workers']} workers and {change}"]
    if _steps_of_epoch(saved) != _steps_of_epoch(now):
        return [
            f"dataloader_drop_last and {change}: {_steps_of_epoch(saved)} steps an epoch (now {_steps_of_epoch(now)})"
        ]
    return []


def converted(saved: Position, now: Position) -> dict[str, int]:
    """Return a saved run's position, counted in this run's batches of a rank; their steps have the same samples."""
    epoch, batches = saved["epoch"], saved["batches"]
    if not has_other_layout(saved, now):
        return {"epoch": epoch, "batches": batches}
    if batches == _batches_of_epoch(saved):  # the last step of an epoch may be shorter
        return {"epoch": epoch, "batches": _batches_of_epoch(now) or 0}
    steps = -(-batches // saved["gradient_accumulation_steps"])
    return {"epoch": epoch, "batches": steps * now["gradient_accumulation_steps"]}


def at_step(global_step: int, *, updates_per_epoch: int, accumulation: int) -> dict[str, int]:
    """Return the position after so many optimizer steps, computed as the Trainer does."""
    epoch, steps = divmod(global_step, updates_per_epoch)
    return {"epoch": epoch, "batches": steps * accumulation}


def _layout(position: Position) -> tuple[int, int, int]:
    """Return units a micro-batch, micro-batches a step, and processes; a unit is a sample or a batch by tokens."""
    size, accumulation, processes = (int(position[name]) for name in LAYOUT)
    return (1 if position.get(TOKENS) else size), accumulation, processes


def _global_batch(position: Position) -> int:
    size, accumulation, processes = _layout(position)
    return size * accumulation * processes


def _describe_batch(position: Position) -> str:
    size, accumulation, processes = _layout(position)
    if position.get(TOKENS):
        return (
            f"{_global_batch(position)} batches by tokens: --gradient_accumulation_steps {accumulation} x {processes} "
            "processes"
        )
    return (
        f"{_global_batch(position)} samples: --per_device_train_batch_size {size} x "
        f"--gradient_accumulation_steps {accumulation} x {processes} processes"
    )


def _batches_of_epoch(position: Position) -> int | None:
    """Return the number of batches of a rank in an epoch; None for a stream."""
    if position["num_samples"] is None:
        return None
    size, _, processes = _layout(position)
    drop_last = bool(position.get("dataloader_drop_last"))
    units = int(position[TOKEN_BATCHES] if position.get(TOKENS) else position["num_samples"])
    return len(RankBatches(units, size, ranks=(0, processes), drop_last=drop_last))


def _steps_of_epoch(position: Position) -> int | None:
    batches = _batches_of_epoch(position)
    return None if batches is None else -(-batches // int(position["gradient_accumulation_steps"]))
