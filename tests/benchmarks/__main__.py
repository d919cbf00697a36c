"""
`python -m tests.benchmarks [NAME...] [--device cpu|cuda] [--repeats N] [--json FILE] [--markdown]` measures.

Without names it runs all benchmarks that there are for the device, one after the other, each in a process of its own.
FILE gets what is found after each of them; what it has of others stays. The exit code is 1 if a bound is missed or a
benchmark failed. `python -m tests.benchmarks gpu ...` is the set for a card alone: tests/benchmarks/gpu/__main__.py.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from tests.benchmarks.contest import REPEATS
from tests.benchmarks.runner.find import DEVICES, Benchmark, found, listed
from tests.benchmarks.runner.measure import measure
from tests.benchmarks.runner.results import Results, as_text
from tests.benchmarks.runner.table import table

GPU = "gpu"


def chosen(names: list[str], device: str) -> list[Benchmark]:
    """The benchmarks of these names, or all for the device. Raises ValueError for one that is none for it."""
    benchmarks = found()
    if unknown := [name for name in names if name not in benchmarks]:
        raise ValueError(f"unknown: {', '.join(unknown)}; there are {', '.join(benchmarks)}")
    if elsewhere := [name for name in names if device not in benchmarks[name].devices]:
        raise ValueError(f"not for {device}: {', '.join(elsewhere)}")
    return [each for name, each in benchmarks.items() if name in names or (not names and device in each.devices)]


def main(argv: list[str]) -> int:
    """Measure what is asked; returns the exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.benchmarks", formatter_class=formatter, epilog=listed())
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all for the device")
    parser.add_argument("--device", choices=DEVICES, default=DEVICES[0], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go, whole after each benchmark")
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    asked = parser.parse_args(argv)
    if asked.repeats < 1:
        parser.error(f"--repeats {asked.repeats}: give 1 or more")
    try:
        benchmarks = chosen(asked.names, asked.device)
    except ValueError as error:
        parser.error(str(error))
    results = Results.read(asked.json) if asked.json is not None else Results()
    for benchmark in benchmarks:
        outcome = measure(benchmark, asked.device, asked.repeats)
        results.add(asked.device, benchmark.name, outcome)
        if asked.json is not None:
            results.write(asked.json)
        if not asked.markdown:
            print(as_text(benchmark.name, outcome), flush=True)
    ran = results.of(asked.device, [benchmark.name for benchmark in benchmarks])
    if asked.markdown:
        print(table(ran))
    return 0 if ran.all_hold else 1


if __name__ == "__main__":
    if sys.argv[1:2] == [GPU]:
        del sys.argv[0]  # it reads its own arguments
        runpy.run_module(f"tests.benchmarks.{GPU}", run_name="__main__", alter_sys=True)
    sys.exit(main(sys.argv[1:]))
