"""The trainings of the table, and how far each layout is from the whole batch on one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.launching import DDP, Ended, launcher, run
from tests.support.parity import as_flags, history
from tests.training.layouts.tasks import CASES

STEPS, GLOBAL_BATCH = 20, 8
FULL, RAGGED = "full batches", "a ragged end"
# The last step of an epoch has 1, 3 or 5 samples: on two processes a rank may have none of its own, or some.
SIZES = {FULL: [160], RAGGED: [33, 35, 37]}
TIMES_REVERSED = 3
SECONDS = 600
ARGUMENTS: dict[str, Any] = {
    "task": "tests.training.layouts.tasks:build",
    "report_to": "none",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_steps": STEPS,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": STEPS // 2,
    "save_strategy": "no",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Processes, samples of a micro-batch, micro-batches of a step; `evaluated` is the batch of an evaluation."""

    name: str
    processes: int
    batch: int
    accumulation: int
    evaluated: int
    is_reversed: bool = False

    def command(self, folder: Path, case: str, size: int, more: Mapping[str, Any]) -> list[str]:
        arguments = {
            **ARGUMENTS,
            "task_args": {"case": case, "size": size, "reversed": self.is_reversed},
            "output_dir": folder,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "per_device_eval_batch_size": self.evaluated,
            "expect_num_processes": self.processes,
            "use_cpu": self.processes == 1,
            **CASES[case].flags,
            **more,
        }
        return as_flags(arguments)


WHOLE = Layout(name="1 x 8", processes=1, batch=8, accumulation=1, evaluated=8)
REVERSED = Layout(name="1 x 8 reversed", processes=1, batch=8, accumulation=1, evaluated=8, is_reversed=True)
OTHERS = (
    Layout(name="1 x 4, acc. 2", processes=1, batch=4, accumulation=2, evaluated=5),
    Layout(name="2 x 4", processes=2, batch=4, accumulation=1, evaluated=4),
    Layout(name="2 x 2, acc. 2", processes=2, batch=2, accumulation=2, evaluated=3),
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest relative differences from the whole batch over all steps, and over all evaluations."""

    loss: float
    grad_norm: float
    evaluation: float

    def within(self, bound: float, reversed_: Difference) -> bool:
        return all(
            value <= max(bound, TIMES_REVERSED * noise)
            for value, noise in zip(vars(self).values(), vars(reversed_).values(), strict=True)
        )

    def __str__(self) -> str:
        return " ".join(f"{value:.0e}".replace("e-0", "e-").replace("e+00", "") for value in vars(self).values())


def size_of(case: str, data: str) -> int:
    return SIZES[data][list(CASES).index(case) % len(SIZES[data])]


def place(folder: Path, case: str, data: str, layout: Layout) -> Path:
    return folder / f"{case}, {data}, {layout.name}".replace("/", "by")


def train(folder: Path, cases: Sequence[str], layouts: Sequence[Layout], config: Path | None, **more: Any) -> None:
    """Train the cases in these layouts, all of one number of processes, in one launch by `config`."""
    plan = [(case, data, layout) for case in cases for data in SIZES for layout in layouts]
    commands = [
        layout.command(place(folder, case, data, layout), case, size_of(case, data), more)
        for case, data, layout in plan
    ]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"commands-{layouts[0].processes}.json"
    file.write_text(json.dumps(commands), encoding="utf-8")
    start = [sys.executable] if config is None else launcher(config)
    ended: Ended = run([*start, "-m", "tests.training.layouts.ranks", str(file)], seconds=SECONDS)
    assert ended.code == 0, ended.err[-3000:]


def train_alone(folder: Path, cases: Sequence[str], **more: Any) -> None:
    train(folder, cases, [WHOLE, REVERSED, OTHERS[0]], None, **more)


def train_on_two(folder: Path, cases: Sequence[str], config: Path = DDP, **more: Any) -> None:
    train(folder, cases, OTHERS[1:], config, **more)


def difference(folder: Path, case: str, data: str, layout: Layout, whole: Path | None = None) -> Difference:
    """`whole` is the folder of the whole batches, if it is another one."""
    expected, found = history(place(whole or folder, case, data, WHOLE)), history(place(folder, case, data, layout))
    assert [list(event) for event in found] == [list(event) for event in expected]
    assert sum("grad_norm" in event for event in expected) == STEPS

    def largest(names: Sequence[str], part: str) -> float:
        pairs = [
            (event[name], other[name])
            for event, other in zip(expected, found, strict=True)
            for name in event
            if (name in names if names else name.startswith(part))
        ]
        assert len(pairs) >= 2
        return max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)

    return Difference(loss=largest(["loss"], ""), grad_norm=largest(["grad_norm"], ""), evaluation=largest([], "eval_"))


def lines(folder: Path, cases: Sequence[str], layouts: Sequence[Layout], whole: Path | None = None) -> list[str]:
    """A Markdown table: the largest relative difference of loss, grad_norm, evaluation."""
    shown = [
        "| | | 1 x 8 reversed | " + " | ".join(layout.name for layout in layouts) + " |",
        "|" + "---|" * (3 + len(layouts)),
    ]
    for case in cases:
        for data in SIZES:
            noise = difference(whole or folder, case, data, REVERSED)
            cells = []
            for layout in layouts:
                found = difference(folder, case, data, layout, whole)
                cells.append(f"{found}{'' if found.within(CASES[case].bound, noise) else ' **differs**'}")
            shown.append(f"| {case} | {data} | {noise} | " + " | ".join(cells) + " |")
    return shown
