"""Memory that runs out in mid-run: the step is made again with smaller micro-batches, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.fitting.splitting import evenly
from harness.train import main
from tests.support.fitting.limited_task import BACKWARD, FORWARD, Limited, Samples, collate
from tests.support.parity import TRAINING, as_flags, assert_equal_runs, history, reset, run_harness

TASK = "tests.support.fitting.limited_task:build"
SHORT: dict[str, Any] = {
    **TRAINING,
    "train_sampling_strategy": "sequential",
    "max_steps": 9,
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 2,
}
FIND = {"auto_find_batch_size": True}
# In the second micro-batch of the third step: 12 samples a step, in their order. Never among those that are tried.
COSTLY = [35]
FAILS = {"limit": 6, "costly": COSTLY, "costly_limit": 2}


def numbers(folder: Path) -> list[dict[str, float]]:
    return [event for event in history(folder) if "loss" in event]


def lines(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("Out of memory in step")]


@pytest.mark.parametrize("where", [FORWARD, BACKWARD])
def test_a_step_that_is_out_of_memory_is_made_again_in_parts_and_the_numbers_stay(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_harness(tmp_path / "whole", {**SHORT, "task_args": {"costly": COSTLY}}, task=TASK)
    capsys.readouterr()
    run_harness(tmp_path / "split", {**SHORT, **FIND, "task_args": {**FAILS, "where": where}}, task=TASK)
    # 6 fails, and so does 3.
    assert [line.partition("of at most ")[2] for line in lines(capsys.readouterr().out)] == [
        "3 samples from here on, and the step is made again.",
        "2 samples from here on, and the step is made again.",
    ]
    expected, found = numbers(tmp_path / "whole"), numbers(tmp_path / "split")
    assert [event["step"] for event in found] == list(range(1, 10))
    for one, other in zip(expected, found, strict=True):
        assert other == pytest.approx(one, rel=1e-5), one["step"]


def test_without_the_flag_the_training_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reset()
    given = {**SHORT, "task_args": FAILS, "task": TASK, "report_to": "none", "output_dir": tmp_path, "use_cpu": True}
    assert main(as_flags(given)) == 1
    assert "Out of memory: use a smaller --per_device_train_batch_size" in capsys.readouterr().err


@pytest.mark.slow
def test_a_resume_begins_with_the_parts_that_fit_and_goes_on_to_the_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = {"save_strategy": "steps", "save_steps": 4, **FIND, "task_args": {**FAILS, "dropout": 0.2}}
    random = {**SHORT, **saves, "train_sampling_strategy": "random", "dataloader_num_workers": 1}
    run_harness(tmp_path / "whole", random, task=TASK)
    first = lines(capsys.readouterr().out)
    assert len(first) == 2
    run_harness(tmp_path / "out", {**random, "stop_at_step": 8}, task=TASK)
    manifest = json.loads((tmp_path / "out" / "checkpoint-8" / "harness_state.json").read_text(encoding="utf-8"))
    assert manifest["splitting"] == {"batch_size": 6, "most_rows": 2}
    assert manifest["data"]["per_device_train_batch_size"] == 6
    capsys.readouterr()
    run_harness(tmp_path / "out", {**random, "resume_from_checkpoint": "auto"}, task=TASK)
    out = capsys.readouterr().out
    assert "Micro-batches have 6 samples, as in the checkpoint; a device takes 2 of them in a step." in out
    assert not lines(out)
    assert_equal_runs(tmp_path / "whole", tmp_path / "out")


def test_a_step_is_made_again_from_the_random_state_of_its_beginning(tmp_path: Path) -> None:
    reset()
    model = Limited(limit=6, costly_limit=3, dropout=0.2)
    flags = [*as_flags({**SHORT, "max_steps": 4, "report_to": "none", "output_dir": tmp_path, "use_cpu": True})]
    harness.run([*flags, "--auto_find_batch_size"], model=model, train_dataset=Samples(35), data_collator=collate)
    trials = model.sizes.index(12) + 1
    drawn, sizes = model.draws[trials:], model.sizes[trials:]
    assert sizes == [*[6] * 6, *[3] * 4, *[3] * 4]
    assert drawn[6] == drawn[4]
    # The second may be there again too: older torch draws one number for a dropout, whatever its size.
    assert len(set(drawn[:6])) == 6
    assert len(set(drawn[6:])) == 8
    assert model.failures == 2  # one of them in a trial


def test_what_can_not_be_split_any_more_ends_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reset()
    given = {**SHORT, **FIND, "task_args": {**FAILS, "costly_limit": 0}, "task": TASK, "report_to": "none"}
    assert main(as_flags({**given, "output_dir": tmp_path, "use_cpu": True})) == 1
    shown = capsys.readouterr()
    assert len(lines(shown.out)) == 3  # 6, 3, 2, 1
    assert "Out of memory: use a smaller --per_device_train_batch_size" in shown.err.splitlines()[-1]


def test_other_errors_are_raised_as_they_are(tmp_path: Path) -> None:
    reset()
    model = Limited()
    model.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")) if model.sizes[6:] else None
    )
    flags = [*as_flags({**SHORT, "report_to": "none", "output_dir": tmp_path, "use_cpu": True})]
    with pytest.raises(RuntimeError, match="a bug"):
        harness.run([*flags, "--auto_find_batch_size"], model=model, train_dataset=Samples(), data_collator=collate)


def test_parts_are_few_and_of_about_one_size() -> None:
    assert evenly(7, most=3) == [range(2), range(2, 4), range(4, 7)]
    assert evenly(6, most=3) == [range(3), range(3, 6)]
    assert evenly(2, most=1) == [range(1), range(1, 2)]
