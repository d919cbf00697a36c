"""
The W&B sweep agent (`wandb agent`) that has started this process: whose run this is, and its parameters.

The agent tells by variables which run of which sweep it starts, and by a file which parameters that has. It repeats
them on the command line, in the form that `command:` in the sweep's file asks for. The file has their types, so it is
the file that is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.agent.processes import between_agent_and_us
from harness.config import Flag, why_unknown
from harness.errors import ConfigError

# W&B decides these for a run of a sweep, and passes over what is given.
OF_THE_RUN = ("wandb_project", "wandb_entity", "wandb_run_id")
# Where a run's configuration has the names of the sweep's parameters: an agent gives a run that it resumes all of the
# configuration as parameters.
RECORD, NAMES = "harness", "sweep_parameters"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a sweep brings to a command line: values of flags, what is to be said of them, and what is wrong."""

    values: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    problems: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """
    A run of a sweep.

    - given: all values that the agent gives, by name. W&B locks them: the run's configuration keeps these values.
    - file: where they stand.
    - is_strict: whether each parameter must be a flag. One for a script that calls `harness.run` may be the script's.
    """

    sweep_id: str
    run_id: str
    given: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    is_strict: bool = True

    @property
    def output_dir(self) -> Path:
        """Where the run is kept unless a flag says otherwise: the same folder in each attempt."""
        return Path("runs") / f"sweep-{self.sweep_id}" / self.run_id

    @property
    def is_given_again(self) -> bool:
        """Whether it has been started before: W&B then gives all of its configuration, wandb's own part with it."""
        return "_wandb" in self.given

    @property
    def parameters(self) -> dict[str, Any]:
        """The sweep's own parameters among what is given, under the names that flags have."""
        values = {name.replace("-", "_"): value for name, value in self.given.items() if name[:1] != "_"}
        record = self.given.get(RECORD)
        names = record.get(NAMES) if isinstance(record, Mapping) else None
        return values if names is None else {name: values[name] for name in names if name in values}

    def typed(self, argv: Sequence[str]) -> list[str]:
        """
        Return the words of a command line that the agent has not put there.

        Its words follow each other as in its file. By themselves they may be typed: a run that is resumed gets all
        flags that it had.
        """
        words = list(argv)
        for form in self._forms():
            for at in range(len(words) - len(form) + 1) if form else ():
                if words[at : at + len(form)] == form:
                    del words[at : at + len(form)]
                    break
        return [word for word in words if not word.startswith("--_") and not self._is_all(word)]

    def _forms(self) -> list[list[str]]:
        """Return what ${args}, ${args_no_hyphens}, ${args_json_file} and their like become."""
        values = [f"{name}={value}" for name, value in self.given.items()]
        pairs = [word for name, value in self.given.items() for word in (f"--{name}", f"{value}")]
        switches = [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in self.given.items()
            if value is not False
        ]
        file = [str(Path(self.file).with_suffix(".json"))] if self.given else []
        return [*([f"{prefix}{value}" for value in values] for prefix in ("--", "", "+", "++")), pairs, switches, file]

    def _is_all(self, word: str) -> bool:
        """Whether it is what ${args_json} becomes."""
        if not word.startswith("{"):
            return False
        try:
            return bool(json.loads(word) == self.given)
        except ValueError:
            return False

    def beside(
        self, typed: dict[str, Any], variables: Mapping[str, Any], known: Mapping[str, Flag], refused: Mapping[str, str]
    ) -> Layer:
        """
        Return the parameters that are flags. Takes out of the `typed` flags what W&B decides.

        A parameter of the sweep that is typed too, with another value, holds for the training and not in W&B.
        """
        unknown = {
            name: why_unknown(name, f"Sweep {self.sweep_id}: its parameter {name}", known, refused)
            for name in self.parameters
        }
        values = {name: value for name, value in self.parameters.items() if unknown[name] is None}
        notes = []
        for name in OF_THE_RUN:
            given, own = typed.pop(name, None), variables.get(name)
            if given not in (None, own):
                notes.append(
                    f"--{name}={given} is passed over: the run is one of sweep {self.sweep_id}, and W&B says which "
                    f"({own or 'its own choice'})."
                )
        for name in values.keys() & typed.keys():
            if _differ(known[name], typed[name], values[name]):
                notes.append(
                    f"--{name}={typed[name]} overrules sweep {self.sweep_id}, which has {values[name]}: the training "
                    f"takes {typed[name]}, W&B goes on showing {values[name]}. Take it out of one of them."
                )
        problems = [why for why in unknown.values() if why is not None and self.is_strict]
        if "wandb_fork" in typed:
            problems.append("--wandb_fork: a run of a sweep keeps its id; without the agent it can be forked.")
        return Layer(values=values, notes=notes, problems=problems)


def sweep_run(*, is_strict: bool = True) -> SweepRun | None:
    """Return the run that a sweep agent has started this process for; None without one."""
    sweep_id, run_id = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    if not sweep_id or not run_id:
        return None
    between_agent_and_us()  # now, while they all live
    file = os.environ.get("WANDB_SWEEP_PARAM_PATH", "")
    return SweepRun(sweep_id=sweep_id, run_id=run_id, given=_read(file), file=file, is_strict=is_strict)


def _read(file: str) -> dict[str, Any]:
    """Return the values in the agent's file; none on a machine that does not have it: the command line has them."""
    try:
        entries = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {
        str(name): entry["value"] for name, entry in entries.items() if isinstance(entry, dict) and "value" in entry
    }


def _differ(flag: Flag, typed: Any, of_sweep: Any) -> bool:
    try:
        return bool(flag.value_of(typed) != flag.value_of(of_sweep))
    except ConfigError:  # which is told elsewhere
        return False
