"""What a resume makes of another value than the checkpoint's: each flag says it itself (see OnResume)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.config import Flag, OnResume, plain
from harness.masking import agree, masked

# Not flags: what flags and the launch config together come to.
RESOLVED: Mapping[str, OnResume] = {
    "mixed_precision": "refused",
    "device": "refused",
    "num_processes": "free",
    "total_steps": "checked",
}


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What differs from the arguments of a checkpoint, as `name old -> new`; `refused` is a part of `told`."""

    told: tuple[str, ...]
    refused: tuple[str, ...]


def recorded(flags: Mapping[str, Any], **resolved: Any) -> dict[str, Any]:
    """What a checkpoint keeps of a run's arguments: JSON types, no secrets."""
    arguments: dict[str, Any] = masked(plain({**flags, **resolved}))
    return arguments


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], flags: Mapping[str, Flag]) -> Changes:
    """
    Compare the arguments of a checkpoint with those of today.

    A name that one of them lacks is of another version and says nothing; with {} for a Trainer's nothing differs.
    """
    kinds = {**RESOLVED} | {name: flag.on_resume for name, flag in flags.items()}
    # Earlier versions have recorded what is masked now, and of a masked value nobody knows what it was.
    saved = masked(saved)
    compared = [name for name in now if kinds[name] != "unrelated" and name in saved]
    changed = [name for name in compared if not agree(saved[name], now[name], name)]
    refused = [name for name in changed if kinds[name] == "refused"]
    # Longer is a wish; shorter would end on another schedule than it was begun with.
    was_asked = not {"max_steps", "num_train_epochs"}.isdisjoint(changed)
    if was_asked and now["total_steps"] < saved["total_steps"]:
        refused.append("total_steps")
    told = {name: f"{name} {_shown(saved[name])} -> {_shown(now[name])}" for name in changed}
    return Changes(told=tuple(told.values()), refused=tuple(told[name] for name in refused))


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
