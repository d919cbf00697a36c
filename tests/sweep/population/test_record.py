"""The record of a population, its table, and the commands that train a member anew."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.sweep.population.record import record_of, replay, table, write_record
from harness.sweep.population.schedule import Rules, ancestry, generations
from harness.sweep.population.state import rules_of_sweep
from harness.sweep.spec import read_spec
from harness.sweep.study import Sweep

SIZE = 4


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    content = {
        "method": "population",
        "metric": {"name": "eval/loss"},
        "parameters": {"learning_rate": {"min": 0.1, "max": 0.9}, "warmup_steps": {"value": 1}},
        "population": {"size": SIZE, "perturbation_interval": 4, "resample_probability": 0},
    }
    path = tmp_path / "population.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    flags = [
        "--task=tests.support.tasks.parity_task:build",
        "--eval_strategy=steps",
        "--eval_steps=4",
        "--max_steps=12",
    ]
    return Sweep(spec=read_spec(str(path)), name="study", folder=tmp_path, storage="", count=0, seed=1, flags=flags)


@pytest.fixture
def rules(sweep: Sweep) -> Rules:
    return rules_of_sweep(sweep)


# Member 3 is worst in the first generation, member 0 best; in the second member 1 is worst, and member 3 best.
OBJECTIVES = {(0, m): float(v) for m, v in enumerate((1, 2, 3, 4))} | {
    (1, m): float(v) for m, v in enumerate((2, 9, 3, 1))
}
ENDED = OBJECTIVES | {(2, m): float(v) for m, v in enumerate((5, 4, 6, 7))}


def test_a_generation_is_decided_when_all_members_have_ended_the_one_before(rules: Rules) -> None:
    assert len(generations(rules, {})) == 1
    assert len(generations(rules, {key: OBJECTIVES[key] for key in list(OBJECTIVES)[:3]})) == 1
    assert len(generations(rules, OBJECTIVES)) == len(generations(rules, ENDED)) == 3
    assert generations(rules, ENDED)[:2] == generations(rules, {**OBJECTIVES, (1, 0): 100.0})[:2]


def test_weights_come_from_the_parents_not_from_the_members(rules: Rules) -> None:
    decided = generations(rules, OBJECTIVES)
    assert [each.member for each in ancestry(decided, 1)] == [0, 3, 1]
    assert [each.member for each in ancestry(decided, 3)] == [0, 3, 3]
    assert [each.member for each in ancestry(decided, 2)] == [2, 2, 2]
    assert [(each.from_step, each.to_step) for each in ancestry(decided, 1)] == [(0, 4), (4, 8), (8, 12)]


def test_the_record_has_each_member_with_all_that_it_has_trained(sweep: Sweep, rules: Rules, tmp_path: Path) -> None:
    record = record_of(sweep, rules, ENDED)
    write_record(tmp_path, record, suffix="1")
    assert json.loads((tmp_path / "population.json").read_text(encoding="utf-8")) == record
    assert [path.name for path in tmp_path.glob("population.json*")] == ["population.json"]
    assert (record["best"], record["goal"], record["ends"]) == (1, "minimize", [4, 8, 12])
    third = record["members"][3]["segments"]
    assert [segment["parent"] for segment in third] == [None, 0, 3]
    assert [segment["objective"] for segment in third] == [4.0, 1.0, 7.0]
    assert third[1]["values"]["learning_rate"] != third[0]["values"]["learning_rate"]
    unfinished = record_of(sweep, rules, OBJECTIVES)
    assert unfinished["best"] is None
    assert record_of(sweep, rules, {**ENDED, (2, 0): math.inf})["members"][0]["segments"][2]["objective"] is None


def test_the_table_says_where_each_piece_is_from(sweep: Sweep, rules: Rules) -> None:
    lines = table(record_of(sweep, rules, ENDED))
    assert lines[0] == "member 0"
    assert "member 1  (best)" in lines
    (copied,) = [line for line in lines if line.endswith("from member 0")]
    assert copied.startswith("  steps 4-8         eval/loss 1           learning_rate ")


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line.replace('"$folder"', "FOLDER")) for line in text.splitlines() if line.startswith("run ")]


def test_a_replay_has_a_command_for_each_piece_with_values_of_its_own(sweep: Sweep, rules: Rules) -> None:
    segments: Any = ancestry(generations(rules, ENDED), 1)
    first, second, third = (each.values["learning_rate"] for each in segments)
    text = replay(rules, ENDED, 1, ["run", "--task=x"])
    assert commands(text) == [
        ["run", "--task=x", f"--learning_rate={first}", "--stop_at_step=4", "--output_dir", "FOLDER"],
        [
            *("run", "--task=x", f"--learning_rate={second}", "--change_on_resume", "learning_rate"),
            *("--stop_at_step=8", "--resume_from_checkpoint=true", "--output_dir", "FOLDER"),
        ],
        [
            *("run", "--task=x", f"--learning_rate={third}", "--change_on_resume", "learning_rate"),
            *("--resume_from_checkpoint=true", "--output_dir", "FOLDER"),
        ],
    ]
    alone = ["run", f"--learning_rate={segments[0].values['learning_rate']}", "--output_dir", "FOLDER"]
    assert commands(replay(rules, ENDED, 0, ["run"])) == [alone]


def test_another_seed_takes_other_decisions(rules: Rules) -> None:
    other = dataclasses.replace(rules, seed=2)
    assert generations(other, ENDED) != generations(rules, ENDED)
