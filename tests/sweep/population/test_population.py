"""A whole population by its command: two workers, kills of all kinds, and the replay of a member that was replaced."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.sweep.population.kills import KINDS, Laboratory, driven, struck


@pytest.mark.slow
def test_killed_trainings_workers_and_drivers_lose_nothing_and_a_replay_comes_to_the_same_bits(tmp_path: Path) -> None:
    laboratory = Laboratory(tmp_path, size=3, num_steps=8, pace=0.1)
    laboratory.prepare()
    random_ = random.Random(1)
    with driven(laboratory) as driver:
        assert struck(driver, KINDS, random_, pause=(1.0, 3.0)) == len(KINDS)
        driver.finish(seconds=600.0)
    assert driver.starts > 1
    record = laboratory.record()
    (copied,) = [
        each["member"] for each in record["members"] if each["segments"][1]["parent"] not in (None, each["member"])
    ]
    assert not [*laboratory.faults([copied])]
    assert not [*(laboratory.study / "exchange").iterdir()]  # nobody needs a checkpoint of before any more
    shown = laboratory.shown()
    assert f"best: member {record['best']}, eval/loss " in shown
    assert shown.count("from member") == 1
