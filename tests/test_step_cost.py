"""
What a step may cost beside its work: counted, since times on a shared machine say nothing.

Each number is the one that was counted when it was written down, with its reason. Who adds to a step raises it, and
says why; who takes away lowers it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.train import main
from tests.support.launching import flags
from tests.support.measuring.cost import Step, steps
from tests.support.parity import TRAINING, reset

STEPS = 8
# What a step begins in Python under harness/, generators' resumptions included: 
FRAMES = 0
SHORT: dict[str, Any] = {**TRAINING, "max_steps": STEPS, "logging_steps": STEPS}


def counted(folder: Path, **more: Any) -> list[Step]:
    """The steps of a training in this process without the first two, which learn of the model, and the last."""
    reset()
    with steps() as found:
        code = main([*flags(folder, {**SHORT, **more}), "--use_cpu"])
    assert code == 0
    assert len(found) == STEPS
    return found[2:-1]


def frames(found: list[Step]) -> list[int]:
    return [sum(step.frames.values()) for step in found]


def described(step: Step) -> str:
    return "\n".join(f"{count:3} {place}" for place, count in step.frames.most_common())
