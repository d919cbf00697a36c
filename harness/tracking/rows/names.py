"""The Trainer's names of metrics as W&B shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# They describe the whole run: the Trainer puts them into the summary, under these names, not into a row.
SUMMARY_ONLY = (
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "total_flos",
)


def rewrite(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    The Trainer's names as its reports show them: `eval_loss` is `eval/loss`, `loss` is `train/loss`.

    Names with a slash are the user's own and stay, as do the five of the summary: twice changes nothing.
    """
    return {_rewritten(name): value for name, value in values.items()}


def _rewritten(name: str) -> str:
    for prefix in ("eval", "test"):
        if name.startswith(f"{prefix}_"):
            return f"{prefix}/{name[len(prefix) + 1 :]}"
    return name if "/" in name or name in SUMMARY_ONLY else f"train/{name}"
