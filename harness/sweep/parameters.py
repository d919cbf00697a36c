"""The parameters of a sweep file: what each may be, in W&B's words, and how Optuna is asked for a value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError

if TYPE_CHECKING:
    import optuna

Scalar = bool | int | float | str
# How a number is drawn between min and max: whether by its logarithm, whether it is rounded to a multiple of q.
RANGES = {
    "int_uniform": (False, True),
    "uniform": (False, False),
    "q_uniform": (False, True),
    "log_uniform": (True, False),
    "q_log_uniform": (True, True),
    "log_uniform_values": (True, False),
    "q_log_uniform_values": (True, True),
}
EXPONENTS = ("log_uniform", "q_log_uniform")  # their min and max are exponents of e
DISTRIBUTIONS = ("constant", "categorical", *RANGES)
KEYS = ("value", "values", "probabilities", "min", "max", "q", "distribution")
# What W&B has and Optuna's samplers have not.
INSTEAD = {
    "categorical_w_probabilities": "categorical with values and probabilities",
    "inv_log_uniform": "log_uniform_values of 1 - x, or values",
    "inv_log_uniform_values": "log_uniform_values of 1 - x, or values",
    **dict.fromkeys(("normal", "q_normal", "beta", "q_beta"), "uniform, q_uniform, or values"),
    **dict.fromkeys(("log_normal", "q_log_normal"), "log_uniform_values, or values"),
}
DIGITS = 12  # of a number that was rounded to a multiple of q: 0.3, not 0.30000000000000004


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """
    A flag that trials differ in: one of `values`, with `probabilities` where they are given, or between low and high.

    With `q` the number is rounded to a multiple of it.
    """

    name: str
    values: tuple[Scalar, ...] = ()
    probabilities: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 0.0
    q: float | None = None
    is_log: bool = False

    @property
    def is_range(self) -> bool:
        """Whether it is a number between two others."""
        return not self.values

    def edges(self) -> tuple[Scalar, ...]:
        """All values, or the lowest and the highest."""
        return self.values or (self._rounded(self.low), self._rounded(self.high))

    def points(self) -> tuple[Scalar, ...]:
        """All values, for a grid. Raises ConfigError for numbers that can't be counted."""
        if not self.is_range:
            return self.values
        if self.is_log or self.q is None:
            raise ConfigError(f"parameters.{self.name}: method grid goes through `values`, not from min to max.")
        first, last = round(self.low / self.q), round(self.high / self.q)
        return tuple(self._rounded(i * self.q) for i in range(first, last + 1))

    def draw(self, random: Random) -> Scalar:
        """One of the values by their probabilities."""
        return random.choices(self.values, weights=self.probabilities)[0]

    def suggest(self, trial: optuna.trial.Trial) -> Scalar:
        """Return the value that a trial has, or gets now."""
        if self.values:
            chosen = trial.suggest_categorical(self.name, self.values)
            return "" if chosen is None else chosen
        if self.q == 1 and self.low == int(self.low) and self.high == int(self.high):
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.is_log)
        return self._rounded(trial.suggest_float(self.name, self.low, self.high, log=self.is_log))

    def _rounded(self, number: float) -> int | float:
        if self.q is None:
            return number
        rounded = round(number / self.q) * self.q
        return int(rounded) if self.q == int(self.q) else float(f"{rounded:.{DIGITS}g}")


def as_text(value: Scalar) -> str:
    """Return a value as a command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def parameter_of(name: str, given: Any) -> Parameter:
    """Return a parameter from what the file says of it. Raises ConfigError."""
    where = f"parameters.{name}"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: {given!r} stands alone; write `value: {given}`, `values: [...]` or min and max.")
    if "parameters" in given:
        raise ConfigError(f"{where}: nested parameters are no flags of a training; write its flags one by one.")
    for key in given:
        if key not in KEYS:
            raise ConfigError(f"{where}.{key} is not known{_hint(str(key), KEYS)}")
    kind = _distribution(where, given)
    if kind in RANGES:
        return _range(name, where, kind, given)
    _refuse(where, given, ("min", "max", "q"), f"does nothing with {'value' if 'value' in given else 'values'}")
    values = _values(where, given, kind)
    return Parameter(name=name, values=values, probabilities=_probabilities(where, given, values))


def _hint(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}."


def _distribution(where: str, given: Mapping[Any, Any]) -> str:
    """Return the distribution, by W&B's rule where the file does not name it."""
    kind = given.get("distribution")
    if kind is None:
        if "value" in given or "values" in given:
            return "constant" if "value" in given else "categorical"
        if "min" not in given or "max" not in given:
            raise ConfigError(f"{where} says no value: give `value`, `values`, or `min` and `max`.")
        return "int_uniform" if all(type(given[edge]) is int for edge in ("min", "max")) else "uniform"
    if kind in INSTEAD:
        raise ConfigError(f"{where}.distribution: {kind} is W&B's alone; use {INSTEAD[kind]}.")
    if kind not in DISTRIBUTIONS:
        raise ConfigError(f"{where}.distribution: {kind} is not known{_hint(str(kind), DISTRIBUTIONS)}")
    return str(kind)


def _range(name: str, where: str, kind: str, given: Mapping[Any, Any]) -> Parameter:
    _refuse(where, given, ("value", "values", "probabilities"), f"does nothing with {kind}")
    if "min" not in given or "max" not in given:
        raise ConfigError(f"{where}: {kind} needs min and max.")
    low, high = (_number(f"{where}.{edge}", given[edge]) for edge in ("min", "max"))
    is_log, is_rounded = RANGES[kind]
    if kind == "int_uniform" and not (low == int(low) and high == int(high)):
        raise ConfigError(f"{where}: int_uniform is between integers, not {low:g} and {high:g}; use uniform.")
    if not is_rounded or kind == "int_uniform":
        _refuse(where, given, ("q",), f"does nothing with {kind}; use q_uniform or q_log_uniform_values")
    if kind in EXPONENTS:
        if max(abs(low), abs(high)) > 700:
            raise ConfigError(f"{where}: min and max of {kind} are exponents of e; use log_uniform_values.")
        low, high = math.exp(low), math.exp(high)
    if not low < high:
        raise ConfigError(f"{where}: min ({low:g}) is not less than max ({high:g}).")
    if is_log and low <= 0:
        raise ConfigError(f"{where}: {kind} is above 0, and min is {low:g}.")
    q = _number(f"{where}.q", given.get("q", 1)) if is_rounded else None
    if q is not None and q <= 0:
        raise ConfigError(f"{where}.q: {q:g} is not above 0.")
    return Parameter(name=name, low=low, high=high, q=q, is_log=is_log)


def _refuse(where: str, given: Mapping[Any, Any], keys: tuple[str, ...], why: str) -> None:
    for key in keys:
        if key in given:
            raise ConfigError(f"{where}.{key} {why}: leave one of them out.")


def _number(where: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)  # YAML reads 1e-3 as a text
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: {value!r} is not a number.") from None
    if not math.isfinite(number):
        raise ConfigError(f"{where}: {value!r} is not finite.")
    return number


def _values(where: str, given: Mapping[Any, Any], kind: str) -> tuple[Scalar, ...]:
    if "value" in given and "values" in given:
        raise ConfigError(f"{where} has value and values: leave one of them out.")
    key = "value" if kind == "constant" else "values"
    if key not in given:
        raise ConfigError(f"{where}: {kind} needs {key}.")
    values = [given["value"]] if kind == "constant" else given["values"]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}.values: {values!r} is no list of values.")
    for value in values:
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(f"{where}: {value!r} is no value of a flag; write texts, numbers, true or false.")
    if len({as_text(value) for value in values}) < len(values):
        raise ConfigError(f"{where}.values: {values} has a value twice.")
    return tuple(values)


def _probabilities(where: str, given: Mapping[Any, Any], values: tuple[Scalar, ...]) -> tuple[float, ...]:
    if "probabilities" not in given:
        return ()
    found = given["probabilities"]
    if not isinstance(found, list) or len(found) != len(values):
        raise ConfigError(f"{where}.probabilities: give one for each of the {len(values)} values.")
    numbers = tuple(_number(f"{where}.probabilities", each) for each in found)
    if min(numbers) < 0 or not math.isclose(sum(numbers), 1.0, abs_tol=1e-6):
        raise ConfigError(f"{where}.probabilities: {found} are not parts of 1.")
    return numbers
