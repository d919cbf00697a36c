"""What differs between a run that was killed and one that was left alone, each kind of difference counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.checkpoint.find import list_checkpoints
from harness.checkpoint.layout import read, why_invalid
from harness.distributed.optimizer_shards import has_optimizer_shards, optimizer_file, read_optimizer
from harness.distributed.zero import load_shard
from tests.faults.plan import FIRST_END, STEPS
from tests.support.parity import TIMING, history

# wandb's own, and the clock's.
NOT_COMPARED = ("_timestamp", "_runtime", "_step")
END = {"train/epoch", "train/global_step"}  # all that the row of the end has; the rest is in the summary
VERDICTS = (
    "lost",  # runs that did not get to their end
    "diverged",  # bits: losses, weights, trainer state
    "checkpoints",  # the last checkpoint is missing, damaged or another
    "leftovers",  # folders of saves that did not end
    "unheeded",  # a signal that asks for it while it trained, and no end with a checkpoint; or an end without one
    "sync",  # `wandb sync` of all offline run folders at once failed
    "rows_missing",
    "rows_double",
    "rows_differing",
    "rows_disordered",
    "runs",  # more than one run in W&B, or none
    "renamed",  # the run in W&B, or an artifact of it, has not the name that it was given
    "false_word",  # the end says something else of the rows than what W&B has
)
CONFIRMED = re.compile(r"(\d+) rows, all confirmed by the server")
CONFIRMED_IN_PART = re.compile(r"(\d+) of \d+ rows confirmed by the server")


@dataclass
class Verdict:
    """How much of each, and what exactly."""

    counts: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)

    def add(self, name: str, detail: str, number: int = 1) -> None:
        assert name in VERDICTS
        self.counts[name] += number
        self.details.append(f"{name}: {detail}")

    @property
    def is_good(self) -> bool:
        return not self.counts


def compare_runs(expected: Path, found: Path, *, processes: int, verdict: Verdict) -> None:
    """Losses, final weights, trainer state and the last checkpoint of two folders of a run."""
    events, others = history(expected), history(found)
    differing = [i for i, (a, b) in enumerate(zip(events, others, strict=False)) if list(a.items()) != list(b.items())]
    if differing or len(events) != len(others):
        first = f"first {events[differing[0]]} became {others[differing[0]]}" if differing else "no value differs"
        verdict.add("diverged", f"{len(others)} events for {len(events)}, {len(differing)} differ, {first}")
    if (expected / "model.safetensors").read_bytes() != (found / "model.safetensors").read_bytes():
        verdict.add("diverged", "the final weights")
    a, b = _state(expected), _state(found)
    if names := [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]:
        verdict.add("diverged", f"trainer_state.json: {[(name, a.get(name), b.get(name)) for name in names]}")
    _compare_checkpoints(expected, found, processes=processes, verdict=verdict)
    left = sorted(path.name for path in found.iterdir() if path.name.endswith((".partial", ".replaced", ".tmp")))
    if left:
        verdict.add("leftovers", ", ".join(left), len(left))


def _compare_checkpoints(expected: Path, found: Path, *, processes: int, verdict: Verdict) -> None:
    for path in list_checkpoints(found):
        if (fault := why_invalid(path)) is not None:
            verdict.add("checkpoints", f"{path.name}: {fault}")
    last = f"checkpoint-{STEPS}"
    if not (found / last).is_dir():
        verdict.add("checkpoints", f"{last} is missing")
        return
    if why_invalid(found / last) is not None:
        return
    if (expected / last / "model.safetensors").read_bytes() != (found / last / "model.safetensors").read_bytes():
        verdict.add("checkpoints", f"{last}: other weights")
    for rank in range(processes):
        a, b = (read(each / last, ranks=(rank, processes)) for each in (expected, found))
        if plain((a.files, a.rank_state)) != plain((b.files, b.rank_state)):
            verdict.add("checkpoints", f"{last}: another optimizer, schedule or generator of rank {rank}")
    a, b = (plain(_shards(each / last)) for each in (expected, found))
    if names := [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]:
        verdict.add("checkpoints", f"{last}: another state in {names}")


def _shards(checkpoint: Path) -> dict[str, Any]:
    """What ranks wrote beside the writer: DeepSpeed's files, FSDP2's part of each."""
    found = {path.name: load_shard(str(path)) for path in sorted(checkpoint.glob("global_step*/*.pt"))}
    if has_optimizer_shards(checkpoint):
        parts = read_optimizer(checkpoint, ranks=(0, 1), is_sharded=False)
        found |= {optimizer_file(rank): part for rank, part in enumerate(parts)}
    return found


def _state(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    del state["log_history"]
    if state["best_model_checkpoint"] is not None:
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    return dict(state)


def plain(value: Any) -> Any:
    """Something that == compares."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), bytes(value.detach().reshape(-1).view(torch.uint8).numpy()))
    if isinstance(value, np.ndarray):
        return (str(value.dtype), tuple(value.shape), bytes(value))
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if type(value).__module__.startswith("deepspeed"):
        return (type(value).__name__, plain(vars(value)) if hasattr(value, "__dict__") else str(value))
    return [plain(each) for each in value] if isinstance(value, tuple | list) else value


def compare_rows(expected: list[dict[str, Any]], found: list[dict[str, Any]], *, verdict: Verdict) -> None:
    """
    The rows in W&B: the same ones, each once, in order, with the same values but for the clock's.

    A row is known by its step and its names: a step has a row of losses and one of an evaluation.
    """
    wanted, there = Counter(map(_key, expected)), Counter(map(_key, found))
    missing, double = wanted - there, there - wanted
    for name, keys in (("rows_missing", missing), ("rows_double", double)):
        if keys:
            steps = sorted({key[0] for key in keys}, key=str)
            verdict.add(name, f"at steps {_short(steps)}", keys.total())
    values = {_key(row): _value(row) for row in expected}
    differing = [row for row in found if _key(row) in values and _value(row) != values[_key(row)]]
    if differing:
        first = differing[0]
        verdict.add("rows_differing", f"{_value(first)} instead of {values[_key(first)]}", len(differing))
    if not missing and not double and list(map(_key, expected)) != list(map(_key, found)):
        verdict.add("rows_disordered", f"steps {_short([_key(row)[0] for row in found])}")


def without_first_end(rows: list[dict[str, Any]], *, verdict: Verdict) -> list[dict[str, Any]]:
    """The rows without that of the first end of a run that was extended: it may be there, once."""
    ends = [row for row in rows if _key(row) == (FIRST_END, tuple(sorted(END)))]
    if len(ends) > 1:
        verdict.add("rows_double", f"the first end, at step {FIRST_END}", len(ends) - 1)
    return [row for row in rows if row not in ends]


def compare_word(said: str, rows: list[dict[str, Any]], *, verdict: Verdict) -> None:
    """What the end of an online run says of its rows, and what the server has of it."""
    if (told := CONFIRMED.search(said)) is not None:
        if int(told[1]) != len(rows):
            verdict.add("false_word", f"{told[0]!r}, and W&B has {len(rows)}")
    elif (told := CONFIRMED_IN_PART.search(said)) is None:
        verdict.add("false_word", "nothing is said of the rows")
    elif int(told[1]) > len(rows):
        verdict.add("false_word", f"{told[0]!r}, and W&B has {len(rows)}")


def _key(row: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    return row.get("train/global_step"), tuple(sorted(name for name in row if not name.startswith("_")))


def _value(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in NOT_COMPARED and not TIMING.search(name)}


def _short(values: list[Any]) -> str:
    return f"{values}" if len(values) <= 12 else f"{values[:12]} and {len(values) - 12} more"
