"""
The schedule of a population: who goes on from whose checkpoint, and with which values.

Nothing here reads a clock or a disk: a decision follows from seed, generation and objective values alone, so a restart
takes the same one. Population based training as in arXiv 1711.09846: after each generation the members of the lowest
quantile go on from the checkpoint of a member of the highest (exploit), with values that are changed a little or drawn
anew (explore).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Value = float | int | str | bool
DIGITS = 6  # significant ones of a value that was computed, so that a command can be read


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included; drawn evenly by their logarithm with `log`, multiples of `q`."""

    low: float
    high: float
    log: bool = False
    q: float | None = None

    def drawn(self, random_: random.Random) -> Value:
        """Draw one."""
        if self.log:
            return self.held(math.exp(random_.uniform(math.log(self.low), math.log(self.high))))
        return self.held(random_.uniform(self.low, self.high))

    def perturbed(self, value: Value, factors: Sequence[float], random_: random.Random) -> Value:
        """Multiply a value by one of the factors; the result stays in the range."""
        return self.held(float(value) * random_.choice(factors))

    def held(self, value: float) -> Value:
        """Return the value of the range that is nearest."""
        if self.q is None:
            return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)
        multiple = (
            min(max(round(value / self.q), math.ceil(self.low / self.q)), math.floor(self.high / self.q)) * self.q
        )
        return int(multiple) if self.q == int(self.q) else float(f"{multiple:.{DIGITS}g}")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Values in their order."""

    values: tuple[Value, ...]
    probabilities: tuple[float, ...] = ()

    def drawn(self, random_: random.Random) -> Value:
        """Draw one, by the probabilities where there are some."""
        return random_.choices(self.values, weights=self.probabilities or None)[0]

    def perturbed(self, value: Value, factors: Sequence[float], random_: random.Random) -> Value:  # noqa: ARG002 - Range's
        """Return a neighbour of the value in the list, or at an end of the list the value itself."""
        at = self.values.index(value) + random_.choice((-1, 1))
        return self.values[min(max(at, 0), len(self.values) - 1)]


Space = Range | Choices


@dataclass(frozen=True, kw_only=True)
class Rules:
    """
    How a population is trained: see README.md for the keys of a sweep file.

    `spaces` are those of the flags that change, by name; `num_steps` are the optimizer steps of a whole training.
    """

    size: int
    num_steps: int
    perturbation_interval: int
    quantile_fraction: float
    resample_probability: float
    perturbation_factors: tuple[float, ...]
    spaces: Mapping[str, Space]
    is_minimized: bool
    seed: int

    @property
    def ends(self) -> tuple[int, ...]:
        """The step at which each generation ends; the last is the end of the training."""
        whole = range(self.perturbation_interval, self.num_steps, self.perturbation_interval)
        return (*whole, self.num_steps)

    @property
    def num_in_quantile(self) -> int:
        """How many members are replaced at the end of a generation: at most half of them."""
        return min(math.ceil(self.size * self.quantile_fraction), self.size // 2)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """
    What a member trains in a generation: from one step to another, with these values of the flags that change.

    `parent` is the member from whose checkpoint of `from_step` it goes on: itself, unless it was replaced; None in the
    first generation.
    """

    generation: int
    member: int
    parent: int | None
    from_step: int
    to_step: int
    values: Mapping[str, Value]

    @property
    def is_replaced(self) -> bool:
        """Whether it goes on from another member's checkpoint."""
        return self.parent not in (None, self.member)


def first_generation(rules: Rules) -> list[Segment]:
    """Return the segments of the first generation, whose values are drawn."""
    segments = []
    for member in range(rules.size):
        random_ = _random(rules, 0, member)
        values = {name: space.drawn(random_) for name, space in rules.spaces.items()}
        segments.append(
            Segment(generation=0, member=member, parent=None, from_step=0, to_step=rules.ends[0], values=values)
        )
    return segments


def next_generation(rules: Rules, before: Sequence[Segment], objectives: Sequence[float]) -> list[Segment]:
    """Return the segments after a generation, whose members have come to these values of the objective."""
    ranked, count = ranking(rules, objectives), rules.num_in_quantile
    lowest = ranked[len(ranked) - count :]
    highest = [member for member in ranked[:count] if math.isfinite(objectives[member])]
    generation = before[0].generation + 1
    segments = []
    for member, segment in enumerate(before):
        parent, values = member, segment.values
        if member in lowest and highest:
            random_ = _random(rules, generation, member)
            parent = random_.choice(highest)
            values = explored(rules, before[parent].values, random_)
        segments.append(
            Segment(
                generation=generation,
                member=member,
                parent=parent,
                from_step=segment.to_step,
                to_step=rules.ends[generation],
                values=values,
            )
        )
    return segments


def generations(rules: Rules, objectives: Mapping[tuple[int, int], float]) -> list[list[Segment]]:
    """
    Return the segments of all generations that are decided, from the objective of each (generation, member) so far.

    The last of them may still be in training; the one after it is decided when all of its members have ended.
    """
    decided = [first_generation(rules)]
    while len(decided) < len(rules.ends):
        number = len(decided) - 1
        found = [objectives[number, member] for member in range(rules.size) if (number, member) in objectives]
        if len(found) < rules.size:
            break
        decided.append(next_generation(rules, decided[-1], found))
    return decided


def ancestry(decided: Sequence[Sequence[Segment]], member: int) -> list[Segment]:
    """Return the segments that the weights of a member come from, the oldest first; the last is its own."""
    found: list[Segment] = []
    at: int | None = member
    for segments in reversed(decided):
        if at is None:
            break
        found.append(segments[at])
        at = segments[at].parent
    return found[::-1]


def ranking(rules: Rules, objectives: Sequence[float]) -> list[int]:
    """Return the members from the best to the worst; what is no number is worst, equal ones keep their order."""

    def worth(member: int) -> float:
        value = objectives[member]
        if math.isnan(value):
            return math.inf
        return value if rules.is_minimized else -value

    return sorted(range(len(objectives)), key=worth)


def explored(rules: Rules, values: Mapping[str, Value], random_: random.Random) -> dict[str, Value]:
    """Return the values of a member that was copied as the copy has them: each drawn anew, or changed a little."""
    found: dict[str, Value] = {}
    for name, space in rules.spaces.items():
        is_drawn = random_.random() < rules.resample_probability
        found[name] = (
            space.drawn(random_) if is_drawn else space.perturbed(values[name], rules.perturbation_factors, random_)
        )
    return found


def _random(rules: Rules, generation: int, member: int) -> random.Random:
    # A text is hashed by SHA-512: the same numbers on every machine and in every version of Python.
    return random.Random(f"{rules.seed} {generation} {member}")
