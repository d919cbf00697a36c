"""
What a step may cost beside its work: counted, since times on a shared machine say nothing.

Each number has its reason. Who adds to a step raises it and says why; who takes away lowers it. Host reads are counted
in `tests/gpu/test_syncs.py`, which runs on the CPU too; libraries that a training loads in `tests/test_imports.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.train import main
from tests.support.launching import DDP, ROOT, flags, launcher, run
from tests.support.measuring.cost import Step, steps
from tests.support.parity import TRAINING, reset

STEPS = 8
SHORT: dict[str, Any] = {**TRAINING, "max_steps": STEPS, "logging_steps": STEPS}
# Python frames under harness/ that a step begins, a generator's resumption being one. A hundred take about 10
# microseconds, a thousandth of a step of 10 ms.
FRAMES: list[tuple[dict[str, Any], int, str]] = [
    ({}, 90, "80: loader 20, loss 20, report's sums 10, stop, plan and console 15, step 15"),
    ({"gradient_accumulation_steps": 2}, 130, "117: 37 more for a second micro-batch"),
    ({"logging_steps": 1}, 270, "251: a report's 20 values are gathered, named, written and shown one by one"),
    ({"logging_steps": 1, "report_to": "wandb"}, 310, "283: and go to W&B"),
]
# Collectives that ours adds to those of DDP, by place. Neither is waited for where it begins.
COLLECTIVES = {
    "distributed/transfer.py: sum_over_ranks": 1,  # the labels of the step, beside its forward pass
    "training/stopping.py: _agreed": 1,  # whether to stop, beside the next step
}
OF_DDP = ("training/loss.py: compute", "distributed/replicated.py: backward")  # its forward and its backward
# Modules that `harness train --help` loads: those of Python itself, yaml's and 37 of ours that hold flags, 234 together
# with Python 3.11. A library would be hundreds: torch has 1,500.
MODULES_OF_HELP = 280


def counted(folder: Path, **more: Any) -> list[Step]:
    """The steps of a training in this process without the first two, which learn of the model, and the last."""
    reset()
    with steps() as found:
        code = main([*flags(folder, {**SHORT, **more}), "--use_cpu"])
    assert code == 0
    assert len(found) == STEPS
    return found[2:-1]


@pytest.mark.parametrize(("arguments", "most", "why"), FRAMES, ids=str)
def test_a_step_begins_no_more_frames_than_it_did(
    tmp_path: Path, arguments: dict[str, Any], most: int, why: str
) -> None:
    found = counted(tmp_path / "run", **arguments)
    frames = sorted(sum(step.frames.values()) for step in found)
    assert frames[len(frames) // 2] <= most, f"it was {why}. Now:\n{described(found[2])}"


def described(step: Step) -> str:
    return "\n".join(f"{count:3} {place}" for place, count in step.frames.most_common())


def test_frames_do_not_grow_with_the_steps_that_were_made(tmp_path: Path) -> None:
    found = counted(tmp_path / "run")
    assert {sum(step.frames.values()) for step in found[:2]} == {sum(step.frames.values()) for step in found[-2:]}


@pytest.mark.slow
def test_a_step_of_two_processes_has_two_collectives_of_ours_and_waits_for_neither(tmp_path: Path) -> None:
    command = ["-m", "tests.support.measuring.cost", str(tmp_path / "count"), *flags(tmp_path / "run", SHORT)]
    done = run([*launcher(DDP), *command, "--expect_num_processes", "2"], cwd=tmp_path)
    assert done.code == 0, done.err[-3000:]
    found = json.loads((tmp_path / "count").read_text(encoding="utf-8"))
    assert len(found) == STEPS
    ours = [
        {place: count for place, count in step["collectives"].items() if not place.startswith(OF_DDP)}
        for step in found[2:-1]
    ]
    assert ours == [COLLECTIVES] * len(ours)


def test_the_help_loads_few_modules() -> None:
    code = "import sys; from harness.__main__ import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}print(*sys.modules)"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = ended.stdout.splitlines()[-1].split()
    packages = Counter(name.partition(".")[0] for name in loaded)
    assert len(loaded) <= MODULES_OF_HELP, packages.most_common(10)
