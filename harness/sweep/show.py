"""What has come of a study: its trials, the best of them, and which parameters matter."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError
from harness.flags import read
from harness.sweep.study import FLAGS, REASON, STEP, Study

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
MOST_WAITING = 3  # lines of trials of which nothing is known yet


def table_of(study: Study) -> str:
    """Return a line for each trial, under the names of the parameters."""
    parameters, trials = [*study.sweep.spec.parameters], study.trials()
    metric = study.sweep.spec.metric.name
    rows = [["trial", "state", metric, "step", *parameters, ""]]
    waiting = 0
    for trial in trials:
        state = STATES[trial.state.name]
        if state == "waiting" and (waiting := waiting + 1) > MOST_WAITING:
            continue
        rows.append([str(trial.number), _state(study, trial, state), *_values(trial, parameters), _reason(trial)])
    lines = aligned(rows)
    if waiting > MOST_WAITING:
        lines.append(f"... and {waiting - MOST_WAITING} more that wait")
    return "\n".join(lines)


def aligned(rows: list[list[str]]) -> list[str]:
    """Return the rows as lines with columns; the last column is as long as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(f"{cell:{width}}" for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip()
        for row in rows
    ]


def _state(study: Study, trial: FrozenTrial, state: str) -> str:
    if state == "running" and not study.leases.is_held(trial.number):
        return "ended early"
    return state


def _values(trial: FrozenTrial, parameters: list[str]) -> list[str]:
    given: Mapping[str, Any] = trial.user_attrs.get(FLAGS, {})
    reports = trial.intermediate_values
    value = trial.value if trial.value is not None else reports[max(reports)] if reports else None
    shown = "" if value is None else f"{value:.6g}"
    return [shown, str(trial.user_attrs.get(STEP, "")), *(str(given.get(name, "")) for name in parameters)]


def _reason(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get(REASON, "")).replace("\n", " ")


def summary_of(study: Study) -> str:
    """Return how many trials there are of each state, the best one, and the importance of parameters."""
    counts = Counter(STATES[trial.state.name] for trial in study.trials())
    shown = ", ".join(f"{counts[state]} {state}" for state in STATES.values() if counts[state])
    lines = [f"study {study.sweep.name}: {shown}"]
    if (best := study.best()) is None:
        return "\n".join([*lines, "no trial has ended as planned yet"])
    values = " ".join(f"--{name}={value}" for name, value in best.user_attrs.get(FLAGS, {}).items())
    lines.append(f"best: trial {best.number}, {study.sweep.spec.metric.name} {best.value:.6g}: {values}")
    lines.append(f"its run: {study.sweep.folder / str(best.number)}")
    if found := study.importances():
        shown = ", ".join(f"{name} {part:.2f}" for name, part in sorted(found.items(), key=lambda item: -item[1]))
        lines.append(f"importance: {shown}")
    return "\n".join(lines)


def best_config(study: Study) -> str:
    """Return the flags of the best trial as YAML for `harness train --config`. Raises ConfigError if there is none."""
    if (best := study.best()) is None:
        raise ConfigError(f"The study {study.sweep.name} has no trial that has ended as planned, so no best one.")
    given = [f"--{name}={value}" for name, value in best.user_attrs.get(FLAGS, {}).items()]
    head = (
        f"# The best of study {study.sweep.name}: trial {best.number}, {study.sweep.spec.metric.name} {best.value!r}\n"
        f"# {shlex.join(given)}\n"
    )
    return head + read([*study.sweep.flags, *given]).as_yaml(everything=False)


def write_best(study: Study, path: Path) -> None:
    """Write `best_config` to a file. Raises ConfigError."""
    try:
        path.write_text(best_config(study), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--best_config={path} can't be written: {error}.") from error
