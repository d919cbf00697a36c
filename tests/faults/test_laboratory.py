"""A few deaths of each configuration; `python -m tests.faults` is the long one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.__main__ import summary
from tests.faults.attempt import processes_of
from tests.faults.laboratory import Laboratory, Result, append, results_in
from tests.faults.plan import Case, Configuration, Kill

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="the laboratory reads /proc"),
]


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with Laboratory(tmp_path_factory.mktemp("faults"), pins_run_id=False) as entered:
        yield entered
    assert processes_of(entered.folder) == []


def case(configuration: Configuration, *kills: tuple[str, str, int], index: int = 0) -> Case:
    drawn = tuple(Kill(kind=kind, moment=moment, step=step, part=0.5, seed=index) for kind, moment, step in kills)
    return Case(seed=0, index=index, configuration=configuration, on_small_disk=False, kills=drawn)


def killed(result: Result) -> list[tuple[str, str]]:
    return [(kill["kind"], kill["moment"]) for kill in result.kills]


ALONE = Configuration(who="ours", processes=1, tracking="none")


def test_one_process(laboratory: Laboratory) -> None:
    result = laboratory.run(case(ALONE, ("kill_all", "save", 18), ("torn_newest", "commit", 30)))
    assert killed(result) == [("kill_all", "save"), ("torn_newest", "commit")]
    assert result.attempts == 3
    assert (result.verdicts, result.details) == ({}, [])
    assert "torn" in result.kills[1]["done"]


def test_two_processes(laboratory: Laboratory) -> None:
    configuration = Configuration(who="ours", processes=2, tracking="none")
    result = laboratory.run(case(configuration, ("kill_rank", "step", 20), ("power_cut", "save", 40)))
    assert killed(result) == [("kill_rank", "step"), ("power_cut", "save")]
    assert (result.verdicts, result.details) == ({}, [])


def test_one_process_that_is_tracked_offline(laboratory: Laboratory) -> None:
    configuration = Configuration(who="ours", processes=1, tracking="offline")
    result = laboratory.run(case(configuration, ("kill_all", "step", 27), ("script_then_core", "evaluation", 35)))
    assert killed(result) == [("kill_all", "step"), ("script_then_core", "evaluation")]
    assert (result.verdicts, result.details) == ({}, [])


def test_two_processes_that_are_tracked_online_with_uploads(laboratory: Laboratory) -> None:
    configuration = Configuration(who="ours", processes=2, tracking="online", uploads=True)
    result = laboratory.run(case(configuration, ("core_then_script", "upload", 15), ("kill_rank", "save", 40)))
    assert [kind for kind, _ in killed(result)] == ["core_then_script", "kill_rank"]
    assert (result.verdicts, result.details) == ({}, [])


class Refused(Configuration):
    """It has the label of the one that works, and so its reference."""

    @property
    def arguments(self) -> dict[str, Any]:
        return {**super().arguments, "seed": -1}


def test_a_lost_run_and_changed_weights_are_found_and_kept(
    laboratory: Laboratory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = laboratory.run(case(Refused(who="ours", processes=1, tracking="none"), index=1))
    assert lost.verdicts == {"lost": 1}
    assert "--seed=-1" in lost.details[0]
    reference, _ = laboratory.reference(ALONE)
    weights = reference / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    changed = laboratory.run(case(ALONE, index=2))
    weights.write_bytes(data)
    assert changed.verdicts == {"diverged": 1}
    assert (Path(changed.kept or "") / "model.safetensors").read_bytes() == data
    for result in (lost, changed):
        append(tmp_path / "results.jsonl", result)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"name": "cut')
    assert results_in(tmp_path / "results.jsonl") == [lost, changed]
    assert summary([lost, changed]) == 1
    assert "lost 1, diverged 1" in capsys.readouterr().out
