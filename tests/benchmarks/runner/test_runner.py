from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks.__main__ import chosen, main
from tests.benchmarks.contest import AGAIN, OURS, ROOT, Bound, Curve, Measured, Result, alternate, as_json, shown
from tests.benchmarks.runner.find import FOLDER, found, read
from tests.benchmarks.runner.measure import measure
from tests.benchmarks.runner.results import Results
from tests.benchmarks.runner.table import FILE, PAGE, TITLE, table, written
from tests.support.launching import run


def turns(repeats: int, *, warmup: int = 0, again: bool = True) -> tuple[list[str], dict[str, list[float]]]:
    """The order in which four contestants ran, and their figures: the number of the turn."""
    order: list[str] = []

    def way(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return len(order)

        return run

    found = alternate({name: way(name) for name in "abcd"}, repeats=repeats, warmup=warmup, again=again)
    return order, found


def test_contestants_take_turns_between_two_of_the_base_in_an_order_that_changes() -> None:
    order, figures = turns(2)
    assert "".join(order) == "abcdaadcba"
    assert figures == {"a": [1, 6], "b": [2, 9], "c": [3, 8], "d": [4, 7], "a again": [5, 10]}


def test_a_round_to_warm_up_does_not_count() -> None:
    order, figures = turns(1, warmup=1, again=False)
    assert "".join(order) == "adcbabcd"
    assert figures == {"a": [5], "b": [6], "c": [7], "d": [8]}


def result(ours: list[float], *bounds: Bound) -> Result:
    figures = {"bare": [10.0, 20.0, 30.0], OURS: ours, "bare" + AGAIN: [12.0, 24.0, 36.0]}
    return Result(what="a step", unit="ms", figures=figures, base="bare", bounds=bounds)


def test_a_ratio_is_of_figures_of_one_round() -> None:
    found = result([11.0, 22.0, 99.0], Bound(relation="<=", limit=1.0, over="bare"))
    # The machine slowed down threefold in between; the mean of the base's two turns is 11, 22, 33.
    assert found.ratios(OURS, "bare") == [1.0, 1.0, 3.0]
    assert found.ratio(OURS, "bare") == 1.0
    assert found.equal == pytest.approx(1.2)
    assert found.median("bare") == 22.0


@pytest.mark.parametrize(
    ("bound", "holds"),
    [
        (Bound(relation="<=", limit=1.02, over="bare"), True),
        (Bound(relation="<=", limit=0.98, over="bare"), False),
        (Bound(relation=">=", limit=1.0, over="bare"), True),
        (Bound(relation="<=", limit=0.0), False),
        (Bound(relation="<=", limit=0.5, of="bare", over=OURS), False),
    ],
)
def test_a_bound_is_judged_by_the_middle(bound: Bound, holds: bool) -> None:
    found = result([11.0, 22.0, 33.0], bound)
    assert found.holds(bound) is holds
    assert ("missed" in shown(as_json([found]))) is not holds


def test_growth_is_the_power_between_the_two_largest_sizes() -> None:
    figures = {OURS: {10.0: [5.0], 1e6: [8.0, 8.0, 80.0], 1e4: [0.08]}, "square": {1.0: [1.0], 10.0: [100.0]}}
    curve = Curve(what="a resume", unit="s", size="rows", figures=figures, most_growth=1.05)
    assert curve.growth(OURS) == pytest.approx(1.0)
    assert curve.growth("square") == pytest.approx(2.0)
    assert curve.holds()
    assert not curve.holds("square")


def outcome(measured: Measured, *, error: str = "") -> dict[str, object]:
    found = {"date": "1 May 2026, 10:00 UTC", "machine": "A CPU, 2 cores", "commit": "abc", "versions": "torch 2"}
    return {**found, "about": "What it is.", "repeats": 3, "seconds": 1.0, "error": error, "results": as_json(measured)}


def test_the_table_has_a_row_for_each_result_and_says_what_is_missed() -> None:
    results = Results()
    missed = Bound(relation="<=", limit=0.5, over="bare", floor="0.9: an import")
    curve = Curve(what="a resume", unit="s", size="rows", figures={OURS: {10: [1.0], 100: [10.0]}}, most_growth=1.1)
    results.add("cpu", "step", outcome([result([11.0, 22.0, 33.0], missed), curve]))
    results.add("cpu", "broken", outcome([], error="it ended with 1\nValueError: a | b"))
    assert not results.all_hold
    assert results.of("cpu", ["broken"]).outcomes.keys() == {"cpu"}
    text = table(results)
    lines = text.splitlines()
    assert "A CPU, 2 cores; commit abc; torch 2: broken (1 May 2026, 10:00 UTC), step (1 May 2026, 10:00 UTC)." in lines
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) == 3
    assert rows[0] == "| broken | What it is. | ValueError: a / b |  |  | failed |"
    assert "bare 22.0 (10.0 to 36.0)<br>ours 22.0 (11.0 to 33.0) | ours 1.000 | 1.200 |" in rows[1]
    assert "**missed**: ours / bare 1.000 <= 0.5; floor: 0.9: an import" in rows[1]
    assert "| ours 10: 1.00, 100: 10.0 | power: ours 1.00 |  | power <= 1.1 |" in rows[2]
    page = f"# A page\n\n{TITLE}\n\nold\n"
    assert written(page, results) == f"# A page\n\n{TITLE}\n\n{text}\n"


def test_the_page_shows_the_results_that_are_kept() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == written(text, Results.read(FILE)), "run python -m tests.benchmarks.runner.table"


def test_every_benchmark_says_first_what_it_measures() -> None:
    benchmarks = found()
    assert {"loops", "tracked", "rows", "gpu"} <= set(benchmarks)
    assert [each.name for each in benchmarks.values() if len(each.about) < 20] == []
    with_measure = [path for path in FOLDER.rglob("*.py") if read(path) is not None]
    assert len({path.stem for path in with_measure}) == len(with_measure), "two of one name"


def test_a_name_that_there_is_not_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, said in ([["nothing"], "unknown: nothing; there are"], [["gpu", "loops"], "not for cpu: gpu"]):
        with pytest.raises(SystemExit, match="2"):
            main(argv)
        assert said in capsys.readouterr().err
    assert {"cuda" in each.devices for each in chosen([], "cuda")} == {True}


def test_the_list_imports_no_library() -> None:
    code = "import sys; from tests.benchmarks.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'wandb', 'accelerate'} & sys.modules.keys()))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
    assert "loops" in ended.stdout


@pytest.mark.slow
def test_a_benchmark_runs_in_a_process_of_its_own_and_its_file_keeps_the_others(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"cpu": {"step": outcome([])}}), encoding="utf-8")
    assert main(["graph", "--repeats=1", f"--json={file}"]) == 0
    kept = Results.read(file).outcomes["cpu"]
    assert list(kept) == ["graph", "step"]
    (curve,) = kept["graph"]["results"]
    assert [len(figures) for figures in curve["figures"][OURS].values()] == [1, 1, 1]
    assert "GiB" in kept["graph"]["machine"]
    failed = measure(found()["graph"], "cpu", -1)  # no figures to take the middle of
    assert failed["error"].splitlines()[0] == "it ended with 1"
    assert "Error" in failed["error"].splitlines()[-1]


@pytest.mark.slow
def test_every_loop_makes_all_its_steps() -> None:
    """In a process of their own: some of them leave hooks and warnings."""
    code = (
        "from tests.benchmarks.peers.ways import WAYS, milliseconds\n"
        "from tests.benchmarks.peers.work import SMALL, Work\n"
        "from importlib.util import find_spec\n"
        "absent = {'Lightning Fabric', 'Lightning'} if find_spec('lightning') is None else set()\n"
        "absent |= {'TRL'} if find_spec('trl') is None else set()\n"
        "for name in WAYS.keys() - absent:\n"
        "    work = Work(SMALL, steps=24)\n"
        "    assert milliseconds(name, work) > 0\n"
        "    print(name, len(work.calls))\n"
    )
    ended = run([sys.executable, "-c", code], forked=False)
    assert ended.code == 0, ended.err
    made = {line.rsplit(" ", 1)[0]: line.rsplit(" ", 1)[1] for line in ended.out.splitlines() if line}
    assert {"bare torch", "bare Accelerate", "Trainer", OURS} <= made.keys()
    assert set(made.values()) == {"24"}
