"""A population as its study knows it: which segments have ended, which are next, and where each of them is trained."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from functools import partial
from pathlib import Path

from harness.config import together
from harness.errors import ConfigError
from harness.flags import read
from harness.sweep.checks import as_flags
from harness.sweep.launch import Place
from harness.sweep.population.record import constants_of, flags_of, record_of, write_record
from harness.sweep.population.schedule import Rules, Segment, generations
from harness.sweep.population.settings import rules_of
from harness.sweep.study import Study, Sweep
from harness.sweep.worker import own_flags

# Keys of a sweep file that have no meaning here.
NOT_IN_A_POPULATION = {
    "early_terminate": "a population replaces its worst members, and ends none",
    "run_cap": "population.size says how many members there are",
    "metric.target": "all members train to the end",
}
EXCHANGE = "exchange"  # folder of the checkpoints that a generation ended with, as long as a member may need one


def rules_of_sweep(sweep: Sweep) -> Rules:
    """Return the rules of a sweep of this method. Raises one ConfigError for all that is wrong."""
    together(partial(_refuse_key, sweep, key) for key in NOT_IN_A_POPULATION)
    first = as_flags({name: each.edges()[0] for name, each in sweep.spec.parameters.items()})
    config = read([*sweep.flags, *first]).config
    parameters, is_minimized = [*sweep.spec.parameters.values()], sweep.spec.metric.goal == "minimize"
    return rules_of(sweep.spec.population, parameters, config, is_minimized=is_minimized, seed=sweep.seed)


def _refuse_key(sweep: Sweep, key: str) -> None:
    value = sweep.spec.metric.target if key == "metric.target" else getattr(sweep.spec, key)
    if value is not None:
        raise ConfigError(f"{key}: {NOT_IN_A_POPULATION[key]}; leave it out.")


def with_segments(sweep: Sweep, rules: Rules) -> Sweep:
    """Return the sweep with a trial for each segment: number = generation x size + member."""
    return replace(sweep, count=rules.size * len(rules.ends))


class Population:
    """The population of a study. A decision is never stored: it follows from the values of the segments that ended."""

    def __init__(self, sweep: Sweep, rules: Rules) -> None:
        self.sweep, self.rules = sweep, rules
        self.study = Study(sweep)
        self.metric = sweep.spec.metric.name
        self._written = ""
        self._token = f"{os.getpid()}.{secrets.token_hex(4)}"

    @property
    def exchange(self) -> Path:
        """The folder of the checkpoints that members may go on from."""
        return self.sweep.folder / EXCHANGE

    def objectives(self) -> dict[tuple[int, int], float]:
        """Return the value of each segment, by generation and member, that has ended."""
        found = {}
        for trial in self.study.trials():
            if trial.state.is_finished() and trial.value is not None:
                found[divmod(trial.number, self.rules.size)] = float(trial.value)
        return found

    def generations(self, objectives: dict[tuple[int, int], float]) -> list[list[Segment]]:
        """Return the segments that are decided, a list for each generation."""
        return generations(self.rules, objectives)

    def segments_left(self, objectives: dict[tuple[int, int], float]) -> dict[int, Segment]:
        """Return by their trials' numbers the segments that can be trained now and have not ended."""
        last = self.generations(objectives)[-1]
        return {
            segment.generation * self.rules.size + segment.member: segment
            for segment in last
            if (segment.generation, segment.member) not in objectives
        }

    def place(self, segment: Segment) -> Place:
        """Return the folders of a segment: its member's, and that of the work on it."""
        number = segment.generation * self.rules.size + segment.member
        return Place(run=self.sweep.folder / str(segment.member), work=self.study.leases.place(number))

    def kept(self, step: int, member: int) -> Path:
        """Return where the checkpoint is kept with which a member has ended a generation."""
        return self.exchange / str(step) / str(member)

    def words(self, segment: Segment) -> list[str]:
        """Return the command line of a segment's training."""
        own = own_flags(self.sweep, self.place(segment), segment.member)
        of_segment = flags_of(self.rules, segment, is_first=segment.parent is None)
        return self.sweep.command.words([*self.sweep.flags, *constants_of(self.sweep), *own, *of_segment])

    def write(self, objectives: dict[tuple[int, int], float]) -> None:
        """Write the record, if there is something new. Raises OSError."""
        record = record_of(self.sweep, self.rules, objectives)
        if (text := str(record)) != self._written:
            write_record(self.sweep.folder, record, suffix=self._token)
        self._written = text
