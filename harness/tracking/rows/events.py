"""Which rows are of the same event of a training, which are of its end, and where two of them differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from harness.tracking.rows.journal import COLUMNS

STEP, EPOCH = "train/global_step", "train/epoch"
# What the clock and the machine say, which no two attempts share.
TIMING = ("runtime", "_per_second", "_seconds")
MEASURED = ("train/throughput/", "train/memory/")
# All that the row of the end holds: the numbers of the whole training are in the summary.
END = {STEP, EPOCH, "train/num_input_tokens_seen"}


def is_same_event(recorded: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether both are of one step and have the same names."""
    return recorded.get(STEP) == values.get(STEP) and _names(recorded) == _names(values)


def is_later(recorded: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether the first is of a later step than the second."""
    steps = recorded.get(STEP), values.get(STEP)
    return all(isinstance(step, int | float) for step in steps) and steps[0] > steps[1]  # type: ignore[operator]


def is_end(row: Mapping[str, Any]) -> bool:
    """Whether it is the row that a training makes at its end, which has no values of its own."""
    return EPOCH in row and _names(row) <= END


def num_beyond(rows: Iterable[Mapping[str, Any]]) -> int:
    """Return how many of these rows, in their order, a training that goes on makes again: all but those of an end."""
    count, end = 0, None
    for row in rows:
        end = row.get(STEP) if is_end(row) else end
        count += end is None or row.get(STEP) != end
    return count


def is_own(row: Mapping[str, Any]) -> bool:
    """Whether a row of W&B's is the training's: it has an epoch, or is one of tables. The user's own rows have not."""
    return EPOCH in row or any(isinstance(value, dict) and "_type" in value for value in row.values())


def difference(recorded: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first name, apart from what is measured, whose values differ, and both values; None if none does."""
    for name, value in values.items():
        before = recorded.get(name, value)  # a chart is a table of another name in W&B
        if name in COLUMNS or _is_measured(name) or _is_file(before, value):
            continue
        if before != value and not (_is_nan(before) and _is_nan(value)):
            return name, before, value
    return None


def is_same_row(recorded: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether they are one row, or one that was made again with the same values; a checkpoint's have no histograms."""
    if (timestamp := recorded.get("_timestamp")) is not None and timestamp == row.get("_timestamp"):
        return True
    plain = [{name: value for name, value in each.items() if not isinstance(value, dict)} for each in (recorded, row)]
    return is_same_event(*plain) and difference(*plain) is None


def _names(row: Mapping[str, Any]) -> set[str]:
    """The names as W&B has them, without those of what is measured: other things are on another machine."""
    names = (_name(name, value) for name, value in row.items() if not name.startswith(("_", *MEASURED)))
    return set(names)


def _name(name: str, value: Any) -> str:
    if not isinstance(value, dict) or value.get("_type") != "chart":
        return name
    return f"Custom Chart Tables/{name}_table" if value.get("split_table") else f"{name}_table"


def _is_file(before: Any, value: Any) -> bool:
    """Whether one of them is a table or a chart as W&B has it, by the name of its file."""
    kinds = [each.get("_type") for each in (before, value) if isinstance(each, dict)]
    return len(kinds) == 2 and kinds[0] != kinds[1]


def _is_measured(name: str) -> bool:
    return name.endswith(TIMING) or name.startswith(MEASURED)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
