"""Reads JSON that may be damaged: whatever is in it, either a value of ours comes out or a ValueError that says why."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20  # of a file, a line or an answer
DEEPEST = 64  # what is nested deeper is not ours, and more than wandb's own functions can follow
LARGEST = 1 << 53  # of a number that counts something


def load_json(text: bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError for others, and where one is nested too deep or too long."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES >> 20} MiB")
    try:
        value = json.loads(text.decode())
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if text.count(b"[") + text.count(b"{") > DEEPEST:
        _check_depth(value)
    return value


def read_json(path: Path) -> Any:
    """Return the value of a JSON file. Raises OSError and ValueError."""
    with path.open("rb") as file:
        return load_json(file.read(MOST_BYTES + 1))


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on, of a size that something here may have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [below for each in inner for below in (each.values() if isinstance(each, dict) else each)]
    if any(isinstance(each, dict | list) for each in level):
        raise ValueError(f"it is nested deeper than {DEEPEST}")
