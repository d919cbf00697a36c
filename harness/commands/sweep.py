"""
`harness sweep SWEEP.yaml [OPTIONS] [-- FLAGS]`: train with many values of some flags, and find the best.

The file is W&B's, the search Optuna's. Flags behind `--` are those of all trials. The same command again goes on where
the sweep was ended. Exit codes: 0 all trials are over and one is the best, 1 none is, 2 refused, 85 and 130 stopped
after a save.
"""

from __future__ import annotations

import shlex
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.commands import Parser
from harness.config import is_first_rank
from harness.errors import ConfigError, HarnessError, StoppedError
from harness.signals import INTERRUPTED_EXIT_CODE, PREEMPTED_EXIT_CODE, noting, say
from harness.slurm import slurm_job

if TYPE_CHECKING:
    from harness.sweep.spec import Spec
    from harness.sweep.study import Sweep


def run(argv: Sequence[str]) -> int:
    """Search, or show what has been found; returns the exit code. Raises HarnessError."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    given, flags = parser().parse_args(words[:at]), words[at + 1 :]
    if not is_first_rank():
        raise ConfigError("A sweep starts its trainings itself: leave the launcher out, and give it as --launcher.")
    if given.show is not None:
        return _show(given)
    if given.replay is not None:
        raise ConfigError("--replay goes with --show STUDY.")
    if given.file is None:
        raise ConfigError("Which sweep file? harness sweep SWEEP.yaml, or --show STUDY.")
    sweep = sweep_of(given, flags)
    if sweep.spec.method == "population":
        return search_population(sweep, given, words)
    return search(sweep, given, words)


def sweep_of(given: Namespace, flags: Sequence[str]) -> Sweep:
    """Return the sweep of a command line, checked. Raises one ConfigError for all that is wrong with it."""
    from harness.config import plain
    from harness.flags import FLAGS
    from harness.sweep.checks import check_sweep
    from harness.sweep.recall import storage_of
    from harness.sweep.spec import read_spec
    from harness.sweep.storage import default_storage
    from harness.sweep.study import Sweep

    if given.workers < 1:
        raise ConfigError(f"--workers={given.workers}: use 1 or more.")
    spec = read_spec(given.file)
    command = spec.command.with_launcher(given.launcher)
    all_flags = [*command.flags, *flags]
    first = check_sweep(spec, all_flags)
    name = given.study or spec.name
    if not name or name != Path(name).name:
        raise ConfigError(f"--study={name}: it is also the name of a folder; leave slashes out.")
    folder = (given.folder or Path("runs") / name).expanduser()
    common = {key: value for key, value in first.values.items() if key not in spec.parameters}
    decides = {key: plain(value) for key, value in common.items() if FLAGS[key].on_resume != "unrelated"}
    return Sweep(
        spec=spec,
        name=name,
        folder=folder,
        storage=given.storage or storage_of(folder) or default_storage(folder, is_shared=slurm_job() is not None),
        count=_count(spec, given.count),
        seed=given.seed,
        flags=all_flags,
        arguments=decides,
        command=command,
    )


def _count(spec: Spec, given: int | None) -> int:
    count = spec.run_cap if given is None else given
    if count is not None and count < 1:
        raise ConfigError(f"--count={count}: use 1 or more.")
    if spec.method == "grid":
        return min(spec.num_points(), count or spec.num_points())
    if spec.method == "population":
        return count or 0
    if count is None:
        raise ConfigError(f"method {spec.method} goes on for ever: give --count N, or run_cap in the file.")
    return count


def search(sweep: Sweep, given: Namespace, argv: Sequence[str]) -> int:
    """Train the trials, as the driver or as one of its workers; returns the exit code. Raises HarnessError."""
    from harness.sweep.driver import run_workers, work
    from harness.sweep.show import summary_of, write_best
    from harness.sweep.storage import check_optuna
    from harness.sweep.study import Study, make_study

    check_optuna()
    with noting() as noted:
        if given.worker is not None:
            return 0 if work(sweep, noted) else PREEMPTED_EXIT_CODE
        make_study(sweep)
        say(f"study {sweep.name}: {sweep.count} trials in {sweep.folder}, {given.workers} at once", sys.stdout)
        was_told = run_workers(sweep, argv, workers=given.workers, noted=noted)
        study = Study(sweep)
        if not study.is_over():
            raise _stopped(argv, was_interrupted=noted.was_interrupted, was_told=was_told)
    say(summary_of(study), sys.stdout)
    if study.best() is None:
        raise HarnessError(f"No trial has ended as planned. Each says why: harness sweep --show {sweep.folder}")
    if given.best_config is not None:
        write_best(study, given.best_config)
    else:
        say(f"its flags: harness sweep --show {shlex.quote(str(sweep.folder))} --best_config best.yaml", sys.stdout)
    return 0


def search_population(sweep: Sweep, given: Namespace, argv: Sequence[str]) -> int:
    """Train a population, as the driver or as one of its workers; returns the exit code. Raises HarnessError."""
    from harness.sweep.population.search import search_members, work_on_members

    if given.count is not None or given.best_config is not None:
        raise ConfigError("--count and --best_config do not go with method: population; see --show STUDY --replay.")
    with noting() as noted:
        if given.worker is not None:
            work_on_members(sweep, noted)
            return PREEMPTED_EXIT_CODE if noted.signum else 0
        if not search_members(sweep, argv, workers=given.workers, noted=noted):
            raise _stopped(argv, was_interrupted=noted.was_interrupted, was_told=noted.signum != 0)
    return 0


def _stopped(argv: Sequence[str], *, was_interrupted: bool, was_told: bool) -> HarnessError:
    command = shlex.join(["harness", "sweep", *argv])
    if not was_told:
        return HarnessError(f"All workers have ended, and trials are left; go on with: {command}")
    return StoppedError(
        "Interrupted: the trials that were training are saved" if was_interrupted else "Stopped: the trials are saved",
        exit_code=INTERRUPTED_EXIT_CODE if was_interrupted else PREEMPTED_EXIT_CODE,
        was_preempted=not was_interrupted,
        command=command,
    )


def _show(given: Namespace) -> int:
    from harness.sweep.recall import recalled
    from harness.sweep.show import best_config, summary_of, table_of, write_best
    from harness.sweep.storage import check_optuna
    from harness.sweep.study import Study
    from harness.train import show

    check_optuna()
    sweep = recalled(given.show, given.storage)
    if sweep.spec.method == "population" or given.replay is not None:
        return _show_population(sweep, given)
    study = Study(sweep)
    if given.best_config is not None and str(given.best_config) == "-":
        show(best_config(study))
        return 0
    show(f"{table_of(study)}\n\n{summary_of(study)}\n")
    if given.best_config is not None:
        write_best(study, given.best_config)
    return 0


def _show_population(sweep: Sweep, given: Namespace) -> int:
    from harness.sweep.population.search import replayed, shown
    from harness.train import show

    if sweep.spec.method != "population":
        raise ConfigError(f"--replay is of a population, and {sweep.name} is none: give --best_config FILE.")
    if given.best_config is not None:
        raise ConfigError("The flags of a member change while it trains: give --replay best in place of --best_config.")
    show(f"{shown(sweep)}\n" if given.replay is None else replayed(sweep, given.replay))
    return 0


def parser() -> Parser:
    """Return the command's parser, without the training's flags."""
    own = Parser(
        "sweep",
        usage="%(prog)s SWEEP.yaml [OPTIONS] [-- FLAGS OF harness train], or %(prog)s --show STUDY",
        description="Train with many values of some flags, and find the best: W&B's sweep file, Optuna's search.",
    )
    add = own.add_argument
    add("file", nargs="?", metavar="SWEEP.yaml", help="Sweep file, or the name of a shipped one.")
    add("--workers", type=int, default=1, help="Trials at once on this machine. Default: 1.")
    add("--count", type=int, help="How many trials; default: run_cap in the file, or all points of a grid.")
    add("--study", help="Name of the study; default: `name` in the file, or the file's name.")
    add("--folder", type=Path, help="Where the study and its runs are. Default: runs/STUDY.")
    add(
        "--storage",
        help="Where Optuna keeps the study: sqlite:///PATH, journal:PATH (many machines), or a database. Default: "
        "SQLite in the folder; in a SLURM job a journal there.",
    )
    add("--seed", type=int, default=0, help="Seed of the search. Default: 0.")
    add("--launcher", help="What starts a trial's processes, e.g. 'accelerate launch --num_processes 2'.")
    add("--show", metavar="STUDY", help="Show the trials of a study, by its name or its folder.")
    add(
        "--best_config",
        type=Path,
        metavar="FILE",
        help="Write the flags of the best trial as a --config file; with --show also -, to print it.",
    )
    add(
        "--replay",
        metavar="MEMBER",
        help="With --show of a population: print the commands that train a member anew, by its number, or the best.",
    )
    add("--worker", type=int, help=SUPPRESS)
    return own
