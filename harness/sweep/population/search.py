"""The search of a sweep with method population, as the driver or as one of its workers; and what is shown of one."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from harness.errors import ConfigError
from harness.signals import Noted, say
from harness.sweep.driver import run_workers
from harness.sweep.population.record import read_record, record_of, replay, table
from harness.sweep.population.state import Population, rules_of_sweep, with_segments
from harness.sweep.population.worker import Members
from harness.sweep.storage import check_optuna
from harness.sweep.study import Sweep, make_study
from harness.sweep.worker import parent_watch

BEST = "best"


def work_on_members(sweep: Sweep, noted: Noted) -> None:
    """Be one of several workers, until the population has ended, a stop is noted, or the driver has died."""
    Members(Population(sweep, rules_of_sweep(sweep)), noted, is_alone=parent_watch()).run()


def search_members(sweep: Sweep, argv: Sequence[str], *, workers: int, noted: Noted) -> bool:
    """Train a population to its end; False if a stop was noted before. Raises HarnessError."""
    check_optuna()
    rules = rules_of_sweep(sweep)
    make_study(with_segments(sweep, rules))
    count = f"{rules.size} members, {len(rules.ends)} times {rules.perturbation_interval} steps"
    say(f"study {sweep.name}: {count}, in {sweep.folder}, {workers} at once", sys.stdout)
    population = Population(sweep, rules)
    if workers == 1:
        Members(population, noted).run()
    else:
        run_workers(sweep, argv, workers=workers, noted=noted)
    objectives = population.objectives()
    population.write(objectives)
    if population.segments_left(objectives):
        return False
    say(summary(population), sys.stdout)
    return True


def summary(population: Population) -> str:
    """Return which member is the best in the end, and how to train it again."""
    objectives = population.objectives()
    best = record_of(population.sweep, population.rules, objectives)["best"]
    if best is None:
        left = len(population.segments_left(objectives))
        return f"study {population.sweep.name}: {left} members have not come to the end of their generation yet"
    folder = population.sweep.folder
    value = objectives[len(population.rules.ends) - 1, best]
    return "\n".join(
        [
            f"best: member {best}, {population.metric} {value:.6g}",
            f"its run: {folder / str(best)}",
            f"to train it again: harness sweep --show {shlex.quote(str(folder))} --replay best > replay.sh",
        ]
    )


def shown(sweep: Sweep) -> str:
    """Return all that is known of a population: a line for each segment of each member, and the best."""
    population = Population(sweep, rules_of_sweep(sweep))
    record = record_of(sweep, population.rules, population.objectives())
    return "\n".join([*table(record), "", summary(population)])


def replayed(sweep: Sweep, member: str) -> str:
    """Return the shell script that trains a member anew, given by its number or as `best`. Raises ConfigError."""
    population = Population(sweep, rules_of_sweep(sweep))
    objectives = population.objectives()
    record = record_of(sweep, population.rules, objectives)
    if member == BEST and record["best"] is None:
        raise ConfigError(f"The population {sweep.name} has not ended, so no member is the best: give a number.")
    number = record["best"] if member == BEST else int(member) if member.isdigit() else -1
    if not 0 <= number < population.rules.size:
        raise ConfigError(f"--replay={member}: give a member's number, 0 to {population.rules.size - 1}, or best.")
    # With the launcher, which only the record knows.
    command = read_record(sweep.folder).get("command") or record["command"]
    return replay(population.rules, objectives, number, command)
