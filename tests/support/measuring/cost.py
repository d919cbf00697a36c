"""
Count what each optimizer step does beside its work.

`python -m tests.support.measuring.cost FILE FLAG...` trains with the flags, also under a launcher; rank zero writes to
FILE, as JSON, one object a step: by function the Python frames that were begun under `harness/` and the collectives.
A step is what happens from one call of `train_step` to the next.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from harness.train import main
from tests.support.measuring.syncs import ROOT, Dispatched, seen_now

HARNESS = f"{ROOT}/harness/"


@dataclass
class Step:
    """What one step did, by place: `file: function`."""

    frames: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)

    @property
    def reports(self) -> bool:
        return self.frames["loop.py: report"] > 0


@contextmanager
def steps() -> Iterator[list[Step]]:
    """Yield a list that gets each step of the trainings of the block, of this thread."""
    found: list[Step] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(HARNESS):
            return
        place = f"{file.removeprefix(HARNESS)}: {frame.f_code.co_name}"
        if place == "loop.py: train_step":
            found.append(Step())
        if found:
            found[-1].frames[place] += 1

    def dispatched(operation: Any) -> None:
        if operation.namespace == "c10d" and found:
            ours = [frame for frame in seen_now(str(operation)).frames if frame[0].startswith("harness/")]
            file, function = ours[-1]
            found[-1].collectives[f"{file.removeprefix('harness/')}: {function}"] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        with Dispatched(dispatched):
            yield found
    finally:
        sys.setprofile(before)


if __name__ == "__main__":
    with steps() as counted:
        code = main(sys.argv[2:])
    if os.environ.get("RANK", "0") == "0":
        rows = [{"frames": each.frames, "collectives": each.collectives} for each in counted]
        Path(sys.argv[1]).write_text(json.dumps(rows), encoding="utf-8")
    sys.exit(code)
