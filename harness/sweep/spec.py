"""W&B's sweep file, as far as it means something without W&B; what else it holds is refused."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness.config import RECIPES_DIR, is_sweep, load_yaml, together
from harness.errors import ConfigError
from harness.masking import masked
from harness.sweep.command import Command, command_of
from harness.sweep.parameters import Parameter, parameter_of
from harness.tracking.rows.journal import rewrite

METHODS = ("grid", "random", "bayes", "population")
GOALS = ("minimize", "maximize")
KEYS = (
    *("method", "metric", "parameters", "early_terminate", "run_cap", "population"),
    *("program", "command", "name", "project", "entity", "description"),
)
REFUSED = {
    "controller": "the trials are chosen on this machine anyway; leave it out",
    "imports": "leave it out",
    "job": "it is for W&B Launch; leave it out",
    "scheduler": "it is for W&B Launch; leave it out",
}
MOST_POINTS = 2000  # of a grid: each is a row of the study before the first one starts
DEFAULT_ETA = 3


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What the best trial has the least of, or the most; `name` is that of its rows, such as eval/loss."""

    name: str
    goal: str = "minimize"
    target: float | None = None

    def is_reached(self, value: float) -> bool:
        """Whether a trial with this value is good enough to start no more."""
        if self.target is None:
            return False
        return value >= self.target if self.goal == "maximize" else value <= self.target


@dataclass(frozen=True, kw_only=True)
class EarlyTerminate:
    """
    When a trial is ended ahead of its plan, counted in evaluations.

    - hyperband: Optuna's, between `low` and `high` evaluations (None: as many as a trial has), 1 of `eta` goes on.
    - median: a trial that is worse than the median of the others at the same evaluation ends; not before
      `warmup_evaluations`, nor before so many trials have finished.
    """

    type: str
    low: int = 1
    high: int | None = None
    eta: int = DEFAULT_ETA
    startup_trials: int = 5
    warmup_evaluations: int = 0


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A sweep file. `raw` is what it says, for a later start to compare; `population` is for that method alone."""

    method: str
    metric: Metric
    parameters: Mapping[str, Parameter]
    early_terminate: EarlyTerminate | None = None
    run_cap: int | None = None
    name: str
    project: str | None = None
    entity: str | None = None
    description: str | None = None
    command: Command = field(default_factory=Command)
    population: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)

    def num_points(self) -> int:
        """How many trials a grid has."""
        return math.prod(len(each.points()) for each in self.parameters.values())


def read_spec(source: str) -> Spec:
    """Return what a sweep file says, or a shipped one by its name. Raises one ConfigError for all that is wrong."""
    path = _find(source)
    try:
        raw = load_yaml(path)
    except ValueError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} holds no mapping; a sweep file has method, metric and parameters.")
    return spec_of(raw, name=path.stem)


def spec_of(raw: Mapping[Any, Any], *, name: str) -> Spec:
    """Return what the mapping of a sweep file says; `name` is the study's, unless the file has one. As `read_spec`."""
    masked(raw)  # from here on no message quotes what it calls a secret
    found: dict[str, Any] = {}

    def put(name: str, read: Any) -> None:
        found[name] = read(raw)

    readers = {
        "method": _method,
        "metric": _metric,
        "parameters": _parameters,
        "early_terminate": _early_terminate,
        "run_cap": _run_cap,
        "population": _population,
        "command": command_of,
        **{name: partial(_text, name) for name in ("project", "entity", "description")},
    }
    together([partial(_check_keys, raw), *(partial(put, name, read) for name, read in readers.items())])
    spec = Spec(**found, name=_text("name", raw) or name, raw=_plain(raw))
    _check_together(spec)
    return spec


def sweep_files() -> list[str]:
    """Return the names of the shipped sweep files."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml") if is_sweep(load_yaml(path)))


def _find(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if source not in sweep_files():
        known = ", ".join(sweep_files())
        raise ConfigError(f"{source}: no such file, and no shipped sweep of that name; sweeps: {known}.")
    return RECIPES_DIR / f"{source}.yaml"


def _check_keys(raw: Mapping[Any, Any]) -> None:
    problems = []
    for key in raw:
        if key in REFUSED:
            problems.append(f"{key}: {REFUSED[key]}.")
        elif key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            problems.append(f"{key} is no key of a sweep file." + (f" Did you mean {near[0]}?" if near else ""))
    if problems:
        raise ConfigError(*problems)


def _method(raw: Mapping[Any, Any]) -> str:
    method = raw.get("method")
    if method not in METHODS:
        raise ConfigError(f"method: {method} is not known; use one of: {', '.join(METHODS)}.")
    return str(method)


def _metric(raw: Mapping[Any, Any]) -> Metric:
    given = raw.get("metric")
    if not isinstance(given, Mapping) or "name" not in given:
        raise ConfigError("metric: say which trial is the best, e.g. metric: {name: eval/loss, goal: minimize}.")
    if unknown := [str(key) for key in given if key not in ("name", "goal", "target")]:
        raise ConfigError(f"metric.{unknown[0]} is not known; there are: name, goal, target.")
    goal, target = given.get("goal", "minimize"), given.get("target")
    if goal not in GOALS:
        raise ConfigError(f"metric.goal: {goal} is not known; use minimize or maximize.")
    if target is not None and (isinstance(target, bool) or not isinstance(target, int | float)):
        raise ConfigError(f"metric.target: {target!r} is not a number.")
    name = str(given["name"])
    (row_name,) = rewrite({name: 0})
    if "/" not in name and row_name.startswith("train/"):
        raise ConfigError(f"metric.name: {name} is the name of no row; for the evaluation's write eval/{name}.")
    return Metric(name=row_name, goal=str(goal), target=target)


def _parameters(raw: Mapping[Any, Any]) -> dict[str, Parameter]:
    given = raw.get("parameters")
    if not isinstance(given, Mapping) or not given:
        raise ConfigError("parameters: say what trials differ in, e.g. parameters: {learning_rate: {values: [...]}}.")
    found: dict[str, Parameter] = {}

    def put(key: Any) -> None:
        name = str(key).removeprefix("--").replace("-", "_")
        found[name] = parameter_of(name, given[key])

    together(partial(put, key) for key in given)
    return found


def _early_terminate(raw: Mapping[Any, Any]) -> EarlyTerminate | None:
    given = raw.get("early_terminate")
    if given is None:
        return None
    if not isinstance(given, Mapping) or given.get("type") not in ("hyperband", "median"):
        raise ConfigError("early_terminate.type: use hyperband or median.")
    return _hyperband(given) if given["type"] == "hyperband" else _median(given)


def _hyperband(given: Mapping[Any, Any]) -> EarlyTerminate:
    _known(given, ("type", "min_iter", "max_iter", "s", "eta", "strict"), "early_terminate of hyperband")
    if given.get("strict"):
        raise ConfigError("early_terminate.strict: Optuna's Hyperband compares at its own evaluations; leave it out.")
    if ("min_iter" in given) == ("max_iter" in given):
        raise ConfigError("early_terminate: hyperband takes either min_iter, or max_iter with s.")
    eta = _count(given, "eta", DEFAULT_ETA, least=2)
    if "min_iter" in given:
        _refuse_key(given, "s", "it belongs to max_iter")
        return EarlyTerminate(type="hyperband", low=_count(given, "min_iter", 1), eta=eta)
    most, brackets = _count(given, "max_iter", 1), _count(given, "s", 0)
    low = most // eta**brackets
    if low < 1:
        raise ConfigError(f"early_terminate: max_iter {most} divided {brackets} times by {eta} is less than 1.")
    return EarlyTerminate(type="hyperband", low=low, high=most, eta=eta)


def _median(given: Mapping[Any, Any]) -> EarlyTerminate:
    _known(given, ("type", "startup_trials", "warmup_evaluations"), "early_terminate of median")
    return EarlyTerminate(
        type="median",
        startup_trials=_count(given, "startup_trials", 5),
        warmup_evaluations=_count(given, "warmup_evaluations", 0, least=0),
    )


def _known(given: Mapping[Any, Any], keys: tuple[str, ...], what: str) -> None:
    if unknown := [str(key) for key in given if key not in keys]:
        raise ConfigError(f"early_terminate.{unknown[0]} is not known; {what} has: {', '.join(keys)}.")


def _refuse_key(given: Mapping[Any, Any], key: str, why: str) -> None:
    if key in given:
        raise ConfigError(f"early_terminate.{key}: {why}; leave it out.")


def _count(given: Mapping[Any, Any], key: str, default: int, *, least: int = 1) -> int:
    value = given.get(key, default)
    if type(value) is not int or value < least:
        raise ConfigError(f"early_terminate.{key}: {value!r} is no number from {least} on.")
    return int(value)


def _run_cap(raw: Mapping[Any, Any]) -> int | None:
    cap = raw.get("run_cap")
    if cap is not None and (type(cap) is not int or cap < 1):
        raise ConfigError(f"run_cap: {cap!r} is no number from 1 on.")
    return cap


def _population(raw: Mapping[Any, Any]) -> Mapping[str, Any]:
    given = raw.get("population", {})
    if not isinstance(given, Mapping):
        raise ConfigError("population: it holds keys of its own; see harness/sweep/README.md.")
    if given and raw.get("method") != "population":
        raise ConfigError("population: only method population reads it; leave it out.")
    return {str(key): value for key, value in given.items()}


def _text(name: str, raw: Mapping[Any, Any]) -> str | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, str | int):
        raise ConfigError(f"{name}: {value!r} is no text.")
    return None if value is None else str(value)


def _check_together(spec: Spec) -> None:
    """Raise ConfigError for keys that contradict each other."""
    if spec.method == "population":
        return  # harness/sweep/population has its own rules
    weighed = [each.name for each in spec.parameters.values() if each.probabilities]
    if spec.method == "grid":
        if weighed:
            raise ConfigError(f"parameters.{weighed[0]}.probabilities: a grid has each value once; leave them out.")
        if (number := spec.num_points()) > MOST_POINTS:
            raise ConfigError(f"The grid has {number} points, and at most {MOST_POINTS} are taken: use method random.")
    elif spec.method == "bayes" and weighed:
        raise ConfigError(
            f"parameters.{weighed[0]}.probabilities: TPE learns by itself which values are good; leave them out, or "
            "use method random."
        )


def _plain(raw: Mapping[Any, Any]) -> dict[str, Any]:
    """What decides of the trials, under keys that can be compared: run_cap may grow, and names may change."""
    names = ("method", "metric", "parameters", "early_terminate", "population")
    return {name: raw[name] for name in names if raw.get(name) is not None}
