"""
The table of results in Markdown, as it stands in tests/benchmarks/README.md under "Results".

`python -m tests.benchmarks.runner.table` writes it there anew from results.json in that folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.files import write_whole
from tests.benchmarks.contest import AGAIN, figure
from tests.benchmarks.runner.find import FOLDER
from tests.benchmarks.runner.results import Results

PAGE, FILE = FOLDER / "README.md", FOLDER / "results.json"
TITLE = "## Results"
HEAD = "| benchmark | what | medians (least to most) | over the base | A/A | bound |"
DEVICE = {"cpu": "CPU", "cuda": "GPU"}


def table(results: Results) -> str:
    """All results, by device; above each table where and when they were found."""
    parts = []
    for device, outcomes in results.outcomes.items():
        rows = [row for name, outcome in outcomes.items() for row in _rows(name, outcome)]
        parts += [f"### {DEVICE[device]}", *_found(outcomes), "\n".join([HEAD, "|---|---|---|---|---|---|", *rows])]
    return "\n\n".join(parts) or "None are kept here yet."


def written(page: str, results: Results) -> str:
    """The page with the table of these results; it is its last section."""
    before, title, _ = page.partition(f"\n{TITLE}\n")
    if not title:
        raise ValueError(f"it has no section {TITLE}")
    return f"{before}{title}\n{table(results)}\n"


def _found(outcomes: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for all that were found on one machine, with one code."""
    by_place: dict[tuple[str, str, str], list[str]] = {}
    for name, outcome in outcomes.items():
        place = (outcome["machine"], outcome["commit"], outcome["versions"])
        by_place.setdefault(place, []).append(f"{name} ({outcome['date']})")
    for (machine, commit, versions), names in by_place.items():
        yield f"{machine}; commit {commit}; {versions}: {', '.join(names)}."


def _rows(name: str, outcome: Mapping[str, Any]) -> Iterator[str]:
    if outcome["error"]:
        yield _row(name, outcome["about"], outcome["error"].splitlines()[-1], "", "", "failed")
    for result in outcome["results"]:
        cells = _of_set if "outcome" in result else _of_curve if "size" in result else _of_result
        yield _row(name, *cells(result))


def _of_result(result: Mapping[str, Any]) -> tuple[str, ...]:
    medians, ratios = [], []
    for name, median in result["medians"].items():
        every = [*result["figures"][name], *result["figures"].get(name + AGAIN, [])]
        medians.append(f"{name} {figure(median)} ({figure(min(every))} to {figure(max(every))})")
        if name in result["ratios"]:
            ratios.append(f"{name} {result['ratios'][name]:.3f}")
    bounds = []
    for bound in result["bounds"]:
        over = f" / {bound['over']}" if bound["over"] else ""
        floor = f"; floor: {bound['floor']}" if bound["floor"] else ""
        said = f"{bound['of']}{over} {bound['value']:.3f} {bound['bound']}"
        bounds.append(f"{said}{floor}" if bound["holds"] else f"**missed**: {said}{floor}")
    equal = "" if result["equal"] is None else f"{result['equal']:.3f}"
    what = f"{result['what']}, {result['unit']}"
    return _what(what, result), "<br>".join(medians), "<br>".join(ratios), equal, "<br>".join(bounds)


def _of_curve(curve: Mapping[str, Any]) -> tuple[str, ...]:
    medians = [
        f"{name} {', '.join(f'{size}: {figure(median)}' for size, median in found.items())}"
        for name, found in curve["medians"].items()
    ]
    growth = [f"{name} {power:.2f}" for name, power in curve["growth"].items()]
    bound = ""
    if curve["most_growth"] is not None:
        bound = ("" if curve["holds"] else "**missed**: ") + f"power <= {curve['most_growth']:g}"
    what = f"{curve['what']}, {curve['unit']} by {curve['size']}"
    return _what(what, curve), "<br>".join(medians), f"power: {'; '.join(growth)}", "", bound


def _of_set(row: Mapping[str, Any]) -> tuple[str, ...]:
    figures = {name: value for name, value in row["figures"].items() if not name.startswith("bound ")}
    bounds = [
        f"{name.removeprefix('bound ')}: {value}" for name, value in row["figures"].items() if name not in figures
    ]
    return row["name"], "<br>".join(f"{name} {value}" for name, value in figures.items()), "", "", "<br>".join(bounds)


def _what(what: str, result: Mapping[str, Any]) -> str:
    return f"{what}<br>{result['setting']}" if result["setting"] else what


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def main(page: Path = PAGE, file: Path = FILE) -> None:
    """Write the page anew."""
    write_whole(page, written(page.read_text(encoding="utf-8"), Results.read(file)))


if __name__ == "__main__":
    main()
