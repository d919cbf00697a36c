"""metrics.jsonl without W&B: the rows that W&B would get, each once over all attempts."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harness.train import main
from tests.support.forking import fork
from tests.support.launching import ROOT, SCRIPT
from tests.support.parity import TASK, TIMING, TRAINING, as_flags, reset

SAVING = {**TRAINING, "save_strategy": "steps", "save_steps": 5, "max_steps": 15, "eval_strategy": "steps"}
SAVING |= {"eval_steps": 5, "logging_steps": 2, "seed": 7}
SAME_SCHEDULE = {"lr_scheduler_type": "constant", "allow_changed_arguments": True}


def train(out: Path, **changes: Any) -> list[dict[str, Any]]:
    reset()
    flags = {**SAVING, "task": TASK, "output_dir": out, "report_to": "none", **changes}
    assert main([*as_flags(flags), "--use_cpu"]) == 0
    return rows(out)


def rows(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in line.items() if not TIMING.search(name)} for line in lines]


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "_timestamp"} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    train(out)
    return out


def test_the_rows_are_those_that_wandb_gets(undisturbed: Path, tmp_path: Path) -> None:
    found = rows(undisturbed)
    assert without_time(found) == without_time(train(tmp_path / "out", report_to="wandb"))
    assert [line["_row"] for line in found] == list(range(len(found)))
    assert {line.get("train/global_step") for line in found} >= {2, 5, 10, 14, 15}
    assert not (undisturbed / "wandb").exists()
    assert not (undisturbed / "wandb_run.json").exists()


def test_a_resume_cuts_to_the_rows_of_its_checkpoint(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "out")
    again = train(tmp_path / "out", resume_from_checkpoint=tmp_path / "out" / "checkpoint-5")
    assert without_time(again) == without_time(rows(undisturbed))
    assert again[:3] == rows(undisturbed)[:3]


def test_another_folder_begins_with_the_rows_of_the_checkpoint(undisturbed: Path, tmp_path: Path) -> None:
    again = train(tmp_path / "out", resume_from_checkpoint=undisturbed / "checkpoint-10")
    assert without_time(again) == without_time(rows(undisturbed))


def test_a_fresh_start_keeps_what_another_training_left_aside(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"_row": 0, "_step": 0, "_timestamp": 1.0}\n', encoding="utf-8")
    assert train(tmp_path, max_steps=2)[0]["_timestamp"] > 1
    assert (tmp_path / "metrics.before.jsonl").is_file()


@pytest.mark.parametrize("order", [("none", "wandb", "none"), ("wandb", "none", "wandb")])
def test_a_training_may_go_with_and_without_wandb(order: tuple[str, ...], undisturbed: Path, tmp_path: Path) -> None:
    for tracker, steps in zip(order, (5, 10, 15), strict=True):
        found = train(tmp_path, report_to=tracker, max_steps=steps, resume_from_checkpoint="auto", **SAME_SCHEDULE)
    expected = train(tmp_path / "once", **SAME_SCHEDULE)
    numbered = [(line["_row"], line["train/global_step"], line.get("train/loss")) for line in found]
    assert [line["_row"] for line in found] == list(range(len(found)))
    # Each of the three ends writes a row too.
    losses = [(step, loss) for _, step, loss in numbered if loss is not None]
    assert losses == [(line["train/global_step"], line["train/loss"]) for line in expected if "train/loss" in line]


def test_an_evaluation_alone_leaves_the_rows_of_the_training(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "out")
    reset()
    flags = {**SAVING, "task": TASK, "output_dir": tmp_path / "out", "report_to": "none", "do_eval": True}
    assert main([*as_flags({**flags, "eval_strategy": "no"}), "--use_cpu"]) == 0
    assert rows(tmp_path / "out") == rows(undisturbed)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
def test_each_row_is_there_once_over_20_kills(undisturbed: Path, tmp_path: Path) -> None:
    out, drawn, kills, code = tmp_path / "out", random.Random(3), 0, None
    options = {"times": str(tmp_path / "times"), "seconds": 0.1}
    flags = {**SAVING, "task": "tests.support.tasks.faulty_task:build", "task_args": options, "report_to": "none"}
    flags |= {"output_dir": out, "resume_from_checkpoint": "auto"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    while code != 0:
        with (tmp_path / "log").open("w") as log:
            process = fork([SCRIPT, *as_flags(flags), "--use_cpu"], env=environment, cwd=tmp_path, out=log, err=log)
        before, wanted = size_of(tmp_path / "times"), drawn.randrange(1, 8) if kills < 20 else sys.maxsize
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            if size_of(tmp_path / "times") > before:
                wanted -= 1
                before = size_of(tmp_path / "times")
            if wanted == 0:
                time.sleep(drawn.uniform(0, 0.1))
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        code = process.wait(10)
    assert kills == 20
    assert without_time(rows(out)) == without_time(rows(undisturbed))
