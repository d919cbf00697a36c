"""What a run shows in W&B beside its numbers, counted over all attempts: histograms, and tables by their kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

HISTOGRAMS, PREDICTIONS, TEXTS = "histograms", "tables of predictions", "tables of texts"
KINDS = (HISTOGRAMS, PREDICTIONS, TEXTS)
# How the names of their values begin.
NAMES = {PREDICTIONS: "sample_predictions", TEXTS: "generated_texts"}


class Shown:
    """Rank zero: how often each kind was in a row, and the optimizer step of the last one. Checkpoints keep it."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int | None]] = {}

    def add(self, row: Mapping[str, Any], *, has_histograms: bool) -> None:
        """Count what a row holds; several tables of one kind, of several sets, count once."""
        kinds = [kind for kind, start in NAMES.items() if any(name.startswith(start) for name in row)]
        for kind in [*kinds, *([HISTOGRAMS] if has_histograms else [])]:
            self._seen[kind] = (self._seen.get(kind, (0, None))[0] + 1, row.get("train/global_step"))

    def describe(self, expected: Iterable[str] = ()) -> str:
        """Say how often each was shown, those `expected` also if they never were; "" for nothing of all that."""
        found = dict.fromkeys(expected, (0, None)) | self._seen
        return "; ".join(f"{kind}: {_times(*found[kind])}" for kind in KINDS if kind in found)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, in JSON types."""
        return {kind: {"count": count, "step": step} for kind, (count, step) in self._seen.items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from the counts of a checkpoint; what is none is passed over."""
        for kind, found in saved.items():
            if kind in KINDS and isinstance(found, dict) and isinstance(found.get("count"), int):
                self._seen[kind] = (found["count"], found.get("step"))


def _times(count: int, step: int | None) -> str:
    if count == 0:
        return "none"
    return str(count) if step is None else f"{count}, the last with step {step}"
