"""What is told of a population: its record `population.json`, the table of --show, and the commands of a replay."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.files import write_whole
from harness.masking import masked
from harness.sweep.checks import as_flags
from harness.sweep.parameters import as_text
from harness.sweep.population.schedule import Rules, Segment, ancestry, generations, ranking

if TYPE_CHECKING:
    from harness.sweep.study import Sweep

RECORD_FILE = "population.json"
Objectives = Mapping[tuple[int, int], float]


def record_of(sweep: Sweep, rules: Rules, objectives: Objectives) -> dict[str, Any]:
    """Return the record of a population: each member with all that it has trained, and whose checkpoint it was from."""
    decided = generations(rules, objectives)
    return {
        "study": sweep.name,
        "command": masked(sweep.command.words([*sweep.flags, *constants_of(sweep)])),
        "metric": sweep.spec.metric.name,
        "goal": "minimize" if rules.is_minimized else "maximize",
        "size": rules.size,
        "ends": list(rules.ends),
        "seed": rules.seed,
        "best": best_of(rules, objectives),
        "members": [
            {"member": member, "segments": [described(segments[member], objectives) for segments in decided]}
            for member in range(rules.size)
        ],
    }


def described(segment: Segment, objectives: Objectives) -> dict[str, Any]:
    """Return a segment in JSON types; an objective that is no number is null."""
    value = objectives.get((segment.generation, segment.member), math.nan)
    return {
        "generation": segment.generation,
        "parent": segment.parent,
        "from_step": segment.from_step,
        "to_step": segment.to_step,
        "values": dict(segment.values),
        "objective": value if math.isfinite(value) else None,
    }


def constants_of(sweep: Sweep) -> list[str]:
    """Return the flags of parameters that have one value."""
    return as_flags({name: each.values[0] for name, each in sweep.spec.parameters.items() if len(each.values) == 1})


def best_of(rules: Rules, objectives: Objectives) -> int | None:
    """Return the member that is best at the end of the training; None before all have ended."""
    last = len(rules.ends) - 1
    found = [objectives[last, member] for member in range(rules.size) if (last, member) in objectives]
    return ranking(rules, found)[0] if len(found) == rules.size else None


def write_record(folder: Path, record: Mapping[str, Any], *, suffix: str) -> None:
    """Write the record, whole or not at all; who may write at the same time needs another suffix. Raises OSError."""
    write_whole(folder / RECORD_FILE, json.dumps(record, indent=2) + "\n", durable=True, suffix=f"{suffix}.partial")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record in the folder of a study; {} if there is none."""
    try:
        found = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def table(record: Mapping[str, Any]) -> list[str]:
    """Return the lines that --show prints: a member a line, with its values and objective in each generation."""
    lines = []
    for each in record["members"]:
        lines.append(f"member {each['member']}{'  (best)' if each['member'] == record['best'] else ''}")
        for segment in each["segments"]:
            parent = segment["parent"]
            copied = "" if parent in (None, each["member"]) else f"  from member {parent}"
            values = "  ".join(f"{name} {as_text(value)}" for name, value in segment["values"].items())
            objective = "-" if segment["objective"] is None else f"{segment['objective']:.6g}"
            steps = f"{segment['from_step']}-{segment['to_step']}"
            lines.append(f"  steps {steps:12}{record['metric']} {objective:12}{values}{copied}")
    return lines


def replay(rules: Rules, objectives: Objectives, member: int, command: Sequence[str]) -> str:
    """
    Return a shell script that trains the weights of a member anew, alone, to the same bits; in a folder that it takes.

    `command` is the command line of all trainings. Pieces with equal values are one of it.
    """
    pieces = [list(group) for _, group in groupby(ancestry(generations(rules, objectives), member), _values)]
    lines = [
        "#!/bin/sh",
        f"# The weights of member {member}, trained anew: sh THIS_FILE FOLDER",
        "set -e",
        "export WANDB_DISABLED=true",
        'folder="${1:?say in which new folder to train}"',
    ]
    for i, piece in enumerate(pieces):
        flags = flags_of(rules, piece[-1], is_first=i == 0)
        flags += [] if i == 0 else ["--resume_from_checkpoint=true"]
        lines.append(f'{shlex.join([*command, *flags])} --output_dir "$folder"')
    return "\n".join(lines) + "\n"


def flags_of(rules: Rules, segment: Segment, *, is_first: bool) -> list[str]:
    """Return the flags of a segment: its values, what may differ from the checkpoint that it is from, and its end."""
    flags = [f"--{name}={as_text(value)}" for name, value in segment.values.items()]
    flags += [] if is_first else ["--change_on_resume", *segment.values]
    return flags if segment.to_step == rules.num_steps else [*flags, f"--stop_at_step={segment.to_step}"]


def _values(segment: Segment) -> str:
    return json.dumps(segment.values, sort_keys=True)
