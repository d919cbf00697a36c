"""
What benchmarks have in common: contestants take turns, and what they took is held against a bound.

A benchmark is a module of this folder with `measure(device, repeats)`, which returns results and curves. Its docstring
begins with what it measures; `DEVICES = ("cpu", "cuda")` says where it runs, without it on the CPU alone.
`python -m tests.benchmarks.contest NAME [--device cpu|cuda] [--repeats N] [--json FILE]` measures it in this process;
`python -m tests.benchmarks` gives each benchmark such a process.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import operator
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS, AGAIN = "ours", " again"
REPEATS = 5
HOLDS = {"<=": operator.le, ">=": operator.ge}
EXTRA = "pip install -e '.[benchmarks]'"


class MissingError(Exception):
    """A peer is not installed."""


def needs(*modules: str) -> None:
    """Raises MissingError, with the command that installs them, unless these modules can be imported."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise MissingError(f"{', '.join(missing)} is not installed: {EXTRA}")


def alternate(
    ways: Mapping[str, Callable[[], float]], *, repeats: int = REPEATS, warmup: int = 0, again: bool = True
) -> dict[str, list[float]]:
    """
    Let each way measure itself once in a round, for `repeats` rounds; returns the figures of each, in their order.

    The first way is the base. It runs at the beginning and, as "NAME again", at the end of a round, so that others are
    compared with the machine as it was before and after them, and it is seen how far two equal ones are apart; without
    `again` it runs once. The rest changes its order with each round. `warmup` rounds before that count for nothing.
    """
    (base, first), *rest = ways.items()
    turns = [(base, first), *rest, *([(base + AGAIN, first)] if again else [])]
    found: dict[str, list[float]] = {name: [] for name, _ in turns}
    for number in range(-warmup, repeats):
        between = turns[1 : len(rest) + 1]
        for name, way in [turns[0], *(between if number % 2 == 0 else reversed(between)), *turns[len(rest) + 1 :]]:
            gc.collect()
            figure = way()
            if number >= 0:
                found[name].append(float(figure))
    return found


@dataclass(frozen=True, kw_only=True)
class Bound:
    """
    What the issue asks: the figure of `of`, over that of `over` or, without it, as it is.

    `floor` says what would be left if ours took no time, where the bound can't be had.
    """

    relation: str
    limit: float
    over: str | None = None
    of: str = OURS
    floor: str = ""

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """
    The figures of all repeats by contestant, as `alternate` gives them, in a unit.

    - what: what is measured, as "step of a small model"; setting: sizes, threads and the like.
    - base: whom all are compared with; bounds: those of ratios and figures that the issue names.
    """

    what: str
    unit: str
    figures: Mapping[str, Sequence[float]]
    base: str
    bounds: Sequence[Bound] = ()
    setting: str = ""

    def median(self, name: str) -> float:
        """The middle of what this contestant took; of the base in both of its turns."""
        return statistics.median([*self.figures[name], *self.figures.get(name + AGAIN, [])])

    def ratios(self, of: str, over: str) -> list[float]:
        """One figure over another in each round; of the two turns of the base in a round the mean counts."""
        a, b = self._of_rounds(of), self._of_rounds(over)
        if len(a) != len(b):  # they did not take turns
            return [_divided(statistics.median(a), statistics.median(b))]
        return [_divided(*pair) for pair in zip(a, b, strict=True)]

    def ratio(self, of: str, over: str) -> float:
        """The middle of these ratios."""
        return statistics.median(self.ratios(of, over))

    @property
    def equal(self) -> float | None:
        """How far two equal loops are apart (A/A): the middle of the base's second turns over its first ones."""
        again = self.figures.get(self.base + AGAIN)
        return None if again is None else statistics.median(map(_divided, again, self.figures[self.base]))

    @property
    def contestants(self) -> list[str]:
        """Their names, the base once."""
        return [name for name in self.figures if name != self.base + AGAIN]

    def value(self, bound: Bound) -> float:
        """What is held against the bound."""
        return self.median(bound.of) if bound.over is None else self.ratio(bound.of, bound.over)

    def holds(self, bound: Bound) -> bool:
        """Whether the bound holds."""
        return bool(HOLDS[bound.relation](self.value(bound), bound.limit))

    def _of_rounds(self, name: str) -> list[float]:
        first, again = self.figures[name], self.figures.get(name + AGAIN)
        return list(first) if again is None else [(a + b) / 2 for a, b in zip(first, again, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """
    How a figure grows with a size: `figures` by contestant and size, those of all repeats.

    - size: what grows, as "samples"; most_growth: the largest exponent that is allowed ours, 1.0 being linear.
    """

    what: str
    unit: str
    size: str
    figures: Mapping[str, Mapping[float, Sequence[float]]]
    most_growth: float | None = None
    setting: str = ""

    def growth(self, name: str) -> float:
        """The exponent between the two largest sizes: 0 is constant, 1 linear, 2 quadratic."""
        (a, low), (b, high) = sorted(self.figures[name].items())[-2:]
        return math.log(_divided(statistics.median(high), statistics.median(low))) / math.log(b / a)

    def holds(self, name: str = OURS) -> bool:
        """Whether it does not grow faster than allowed."""
        return self.most_growth is None or name not in self.figures or self.growth(name) <= self.most_growth


Measured = Sequence[Result | Curve]


def in_process(module: str, *arguments: str, **variables: str) -> Any:
    """Run `python -m MODULE ARGUMENTS...` with more variables; returns what its last line of output holds as JSON."""
    command = [sys.executable, "-m", module, *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, **variables}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    if ended.returncode != 0:
        said = f"{ended.stdout[-1000:]}{ended.stderr[-3000:]}"
        raise RuntimeError(f"{' '.join(command[1:])} ended with {ended.returncode}: {said}")
    return json.loads(ended.stdout.splitlines()[-1])


def as_json(measured: Measured) -> list[dict[str, Any]]:
    """Results and curves as they stand in a file, bounds judged."""
    return [_result_as_json(each) if isinstance(each, Result) else _curve_as_json(each) for each in measured]


def _result_as_json(result: Result) -> dict[str, Any]:
    others = [name for name in result.contestants if name != result.base]
    bounds = [
        {
            "of": bound.of,
            "over": bound.over,
            "bound": str(bound),
            "value": result.value(bound),
            "holds": result.holds(bound),
            "floor": bound.floor,
        }
        for bound in result.bounds
    ]
    return {
        "what": result.what,
        "setting": result.setting,
        "unit": result.unit,
        "base": result.base,
        "figures": {name: list(found) for name, found in result.figures.items()},
        "medians": {name: result.median(name) for name in result.contestants},
        "ratios": {name: result.ratio(name, result.base) for name in others},
        "equal": result.equal,
        "bounds": bounds,
    }


def _curve_as_json(curve: Curve) -> dict[str, Any]:
    figures = {name: {f"{size:,.10g}": list(f) for size, f in found.items()} for name, found in curve.figures.items()}
    return {
        "what": curve.what,
        "setting": curve.setting,
        "unit": curve.unit,
        "size": curve.size,
        "figures": figures,
        "medians": {name: {size: statistics.median(f) for size, f in found.items()} for name, found in figures.items()},
        "growth": {name: curve.growth(name) for name in curve.figures},
        "most_growth": curve.most_growth,
        "holds": curve.holds(),
    }


def shown(results: Sequence[Mapping[str, Any]]) -> str:
    """What `as_json` gives, for a terminal."""
    return "\n".join(line for result in results for line in (_curve if "size" in result else _result)(result))


def _result(result: Mapping[str, Any]) -> list[str]:
    lines = [f"{result['what']}, {result['unit']}" + (f" ({result['setting']})" if result["setting"] else "")]
    for name, median in result["medians"].items():
        every = [*result["figures"][name], *result["figures"].get(name + AGAIN, [])]
        ratio = result["ratios"].get(name)
        beside = f"{ratio:.3f} x {result['base']}" if ratio is not None else ""
        if name == result["base"] and result["equal"] is not None:
            beside = f"again / first {result['equal']:.3f}"
        lines.append(f"  {name:28} {figure(median):>10}  ({figure(min(every))} to {figure(max(every))})  {beside}")
    lines += [f"  {told(bound)}" for bound in result["bounds"]]
    return lines


def _curve(curve: Mapping[str, Any]) -> list[str]:
    lines = [f"{curve['what']}, {curve['unit']} by {curve['size']}" + f" ({curve['setting']})" * bool(curve["setting"])]
    for name, medians in curve["medians"].items():
        points = ", ".join(f"{size}: {figure(median)}" for size, median in medians.items())
        lines.append(f"  {name:28} {points}  grows with the power {curve['growth'][name]:.2f}")
    if curve["most_growth"] is not None:
        verdict = "holds" if curve["holds"] else "missed"
        lines.append(f"  bound of the power: <= {curve['most_growth']:g}: {verdict}")
    return lines


def told(bound: Mapping[str, Any]) -> str:
    """A bound, and whether it holds."""
    over = f" / {bound['over']}" if bound["over"] else ""
    floor = f"; the floor: {bound['floor']}" if bound["floor"] else ""
    verdict = "holds" if bound["holds"] else "missed"
    return f"{bound['of']}{over} {bound['value']:.3f}, bound {bound['bound']}: {verdict}{floor}"


def figure(value: float) -> str:
    """Three or more digits that count, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _divided(a: float, b: float) -> float:
    return a / b if b else math.inf if a else 1.0


@dataclass
class Asked:
    """What a benchmark's own process is asked."""

    name: str = ""
    device: str = "cpu"
    repeats: int = REPEATS
    json: Path | None = None


def main() -> int:
    """Measure one benchmark in this process; prints its results, or writes them to a file."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.contest")
    parser.add_argument("name")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(namespace=Asked())
    # The libraries read it when they are imported.
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_SILENT="true")
    os.environ.setdefault("WANDB_MODE", "offline")
    benchmark = import_module(f"tests.benchmarks.{asked.name}")
    try:
        results = as_json(benchmark.measure(asked.device, asked.repeats))
    except MissingError as error:
        print(error, file=sys.stderr)
        return 2
    if asked.json is None:
        print(shown(results))
    else:
        asked.json.write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    from tests.benchmarks import contest  # the module that benchmarks import, not this second copy of it

    sys.exit(contest.main())
