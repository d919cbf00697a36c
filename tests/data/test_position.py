"""The place in the data where a run goes on, whatever processes and micro-batches it goes on with."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.data.loader import RankBatches
from harness.data.position import at_step, converted, has_other_layout, why_other_order
from harness.train import main
from tests.support.launching import DDP, SCRIPT, flags, launcher, run
from tests.support.parity import TRAINING, as_flags, history, reset, run_harness
from tests.support.tasks import recording_task


def position(size: int, accumulation: int, processes: int, **values: Any) -> dict[str, Any]:
    return {
        "epoch": 0,
        "batches": 0,
        "num_samples": 64,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "num_processes": processes,
        "train_sampling_strategy": "random",
        "dataloader_drop_last": False,
        "dataloader_num_workers": None,
        "seed": 42,
        "data_digest": "0123456789abcdef",
        **values,
    }


def steps_from(where: dict[str, Any]) -> list[list[int]]:
    """The samples of the optimizer steps from a place to the end of the epoch, in their order."""
    size, accumulation, processes = (where[name] for name in ("per_device_train_batch_size", *NAMES))
    ranks = []
    for rank in range(processes):
        batches = RankBatches(where["num_samples"], size, ranks=(rank, processes), drop_last=False)
        batches.begin(lambda: np.arange(where["num_samples"]), where["batches"])
        start, own = where["batches"], list(batches)
        ranks.append([[] if batches.is_repeated(start + i) else each for i, each in enumerate(own)])
    rounds = [list(itertools.chain(*batches)) for batches in zip(*ranks, strict=True)]
    return [list(itertools.chain(*rounds[i : i + accumulation])) for i in range(0, len(rounds), accumulation)]


NAMES = ("gradient_accumulation_steps", "num_processes")


def test_every_layout_of_a_global_batch_goes_on_with_the_same_samples_in_the_same_steps() -> None:
    compared = 0
    layouts = [layout for layout in itertools.product((1, 2, 3, 4, 6, 8), repeat=3) if np.prod(layout) in (8, 12)]
    for num_samples, old, new in itertools.product((24, 29, 48, 50), layouts, layouts):
        if np.prod(old) != np.prod(new):
            continue
        before = position(*old, num_samples=num_samples)
        after = position(*new, num_samples=num_samples)
        assert why_other_order(before, after) == ""
        whole = steps_from(before)
        for step in range(len(whole) + 1):
            rounds = -(-num_samples // (old[0] * old[2]))
            before["batches"] = min(step * old[1], rounds)
            after |= converted(before, after)
            rest = steps_from(after)
            case = (num_samples, old, new, step)
            # At the end nothing is left, not less than nothing: an epoch's end is known by that.
            assert after["batches"] <= -(-num_samples // (new[0] * new[2])), case
            assert rest == whole[step:], case
            compared += len(rest)
    assert compared > 10_000


def test_the_same_layout_keeps_the_place_as_it_is() -> None:
    saved = position(4, 2, 1, epoch=3, batches=7)
    assert not has_other_layout(saved, position(4, 2, 1))
    assert converted(saved, position(4, 2, 1)) == {"epoch": 3, "batches": 7}


def test_a_stream_is_counted_by_its_steps() -> None:
    saved, now = (position(*layout, num_samples=None, dataloader_num_workers=0) for layout in ((2, 4, 1), (1, 2, 4)))
    assert why_other_order(saved, now) == ""
    assert converted({**saved, "epoch": 1, "batches": 12}, now) == {"epoch": 1, "batches": 6}


def test_a_place_counted_in_optimizer_steps() -> None:
    assert at_step(7, updates_per_epoch=3, accumulation=4) == {"epoch": 2, "batches": 4}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (position(4, 2, 2), position(4, 2, 1), "a global batch of 16 samples: .* 2 processes .now 8 samples: "),
        (position(4, 2, 2), position(4, 2, 2, num_samples=70), r"^num_samples 64 \(now 70\)$"),
        (position(4, 2, 2), position(8, 1, 2, seed=1), r"^seed 42 \(now 1\)$"),
        (position(4, 2, 2), position(4, 2, 2, data_digest="f" * 16), r"^data_digest 0123456789abcdef \(now f{16}\)$"),
        (position(4, 2, 2), position(4, 2, 2, train_sampling_strategy="sequential"), "train_sampling_strategy random"),
        (
            position(4, 2, 2, train_sampling_strategy="group_by_length"),
            position(8, 1, 2, train_sampling_strategy="group_by_length"),
            r"^train_sampling_strategy group_by_length and per_device_train_batch_size 4 \(now 8\)",
        ),
        (
            position(4, 2, 2, num_samples=None, dataloader_num_workers=2),
            position(8, 2, 1, num_samples=None, dataloader_num_workers=2),
            "^a stream read by 2 workers and per_device_train_batch_size 4",
        ),
        (
            position(4, 2, 2, num_samples=None, dataloader_num_workers=0),
            position(4, 2, 2, num_samples=None, dataloader_num_workers=1),
            r"^dataloader_num_workers 0 \(now 1\)$",
        ),
        (
            position(4, 4, 1, num_samples=117, dataloader_drop_last=True),
            position(16, 1, 1, num_samples=117, dataloader_drop_last=True),
            r"8 steps an epoch \(now 7\)",
        ),
    ],
)
def test_what_changes_the_order_is_named_with_both_values(old: Any, new: Any, says: str) -> None:
    assert re.search(says, why_other_order(old, new))
    assert why_other_order(old, old) == ""


def test_what_one_version_did_not_save_says_nothing() -> None:
    saved = position(4, 2, 2)
    for name in ("data_digest", "dataloader_drop_last", "dataloader_num_workers"):
        del saved[name]
    assert why_other_order(saved, position(8, 1, 2)) == ""
    assert why_other_order({**saved, "data_digest": None}, position(8, 1, 2)) == ""
    assert why_other_order({}, position(8, 1, 2)) == ""


# Whole runs

TASK = "tests.support.tasks.recording_task:build"
# 64 samples, 8 in a step: 16 steps in two epochs.
ARGUMENTS = {**TRAINING, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}


def train(
    folder: Path,
    layout: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
    *,
    resume: Path | None = None,
    options: Any = None,
    num_samples: int = 64,
) -> list[list[int]]:
    """Train with samples a micro-batch, micro-batches a step and processes; returns the samples of each round."""
    size, accumulation, processes = layout
    folder.mkdir()
    arguments = {
        **ARGUMENTS,
        "task": TASK,
        "task_args": {"size": num_samples, **(options or {})},
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        **({"max_steps": 8} if options else {}),
        **({"resume_from_checkpoint": resume} if resume else {}),
    }
    if processes == 1:
        monkeypatch.setenv(recording_task.VARIABLE, str(folder))
        run_harness(folder / "run", arguments, task=TASK)
    else:
        command = [*launcher(DDP), f"--num_processes={processes}", SCRIPT, *flags(folder / "run", arguments)]
        ended = run(command, **{recording_task.VARIABLE: str(folder)})
        assert ended.code == 0, ended.err[-3000:]
        assert resume is None or ended.out.count("The same samples come in the same steps") == 1
    assert len(list(folder.glob("rank-*"))) == processes
    ranks = recording_task.recorded(folder, processes)
    return [list(itertools.chain(*batches)) for batches in zip(*ranks, strict=True)]


def in_steps(
    rounds: Sequence[list[int]], accumulation: int, rounds_of_epoch: int, *, begin: int = 0
) -> list[list[int]]:
    """The samples of each optimizer step; the last of an epoch may have fewer rounds."""
    steps: list[list[int]] = []
    place = begin
    left = list(rounds)
    while left:
        count = min(accumulation, rounds_of_epoch - place)
        steps.append(list(itertools.chain(*left[:count])))
        left, place = left[count:], (place + count) % rounds_of_epoch
    return steps


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in history(folder / "run") if "loss" in entry]


def assert_goes_on(whole: Path, steps: list[list[int]], found: Path, rest: list[list[int]]) -> None:
    assert len(rest) < len(steps), "nothing was resumed"
    assert rest == steps[-len(rest) :]
    assert len(losses(whole)) > 3
    assert losses(found) == pytest.approx(losses(whole), rel=1e-4)
    train_loss = [history(folder / "run")[-1]["train_loss"] for folder in (whole, found)]
    assert train_loss[0] == pytest.approx(train_loss[1], rel=1e-4)


@pytest.mark.slow
def test_two_processes_then_one_then_two_are_two_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = in_steps(train(tmp_path / "whole", (2, 2, 2), monkeypatch), 2, 16)
    assert [len(step) for step in whole] == [8] * 16
    assert sorted(itertools.chain(*whole[:8])) == list(range(64))
    # After step 3 a report is half due: its loss is in the checkpoint, of both ranks.
    checkpoint = tmp_path / "whole" / "run" / "checkpoint-3"
    one = in_steps(train(tmp_path / "one", (4, 2, 1), monkeypatch, resume=checkpoint), 2, 16, begin=6)
    assert_goes_on(tmp_path / "whole", whole, tmp_path / "one", one)
    checkpoint = tmp_path / "one" / "run" / "checkpoint-9"
    two = in_steps(train(tmp_path / "two", (2, 2, 2), monkeypatch, resume=checkpoint), 2, 16, begin=2)
    assert len(two) == 7
    assert_goes_on(tmp_path / "whole", whole, tmp_path / "two", two)


@pytest.mark.slow
def test_data_that_fills_no_whole_step_comes_in_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """61 samples: the 8th and the 16th step have 5, and two processes fill them up."""
    whole = in_steps(train(tmp_path / "whole", (2, 2, 2), monkeypatch, num_samples=61), 2, 16)
    checkpoint = tmp_path / "whole" / "run" / "checkpoint-6"
    rounds = train(tmp_path / "one", (8, 1, 1), monkeypatch, resume=checkpoint, num_samples=61)
    one = in_steps(rounds, 1, 8, begin=6)
    assert len(one) == 10
    last_of_epochs = (1, 9)
    for i, (found, expected) in enumerate(zip(one, whole[6:], strict=True)):
        assert found == (expected[:5] if i in last_of_epochs else expected)


def test_other_micro_batches_are_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = in_steps(train(tmp_path / "whole", (2, 4, 1), monkeypatch), 4, 32)
    for layout, step in (((1, 8, 1), 3), ((8, 1, 1), 9)):
        folder = tmp_path / f"on-{layout[0]}"
        checkpoint = tmp_path / "whole" / "run" / f"checkpoint-{step}"
        rounds = train(folder, layout, monkeypatch, resume=checkpoint)
        rest = in_steps(rounds, layout[1], 64 // layout[0], begin=step % 8 * layout[1])
        assert len(rest) == 16 - step
        assert_goes_on(tmp_path / "whole", whole, folder, rest)


def test_other_micro_batches_of_a_stream_are_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = in_steps(train(tmp_path / "whole", (2, 4, 1), monkeypatch, options={"stream": True}), 4, 32)
    checkpoint = tmp_path / "whole" / "run" / "checkpoint-3"
    rounds = train(tmp_path / "on", (4, 2, 1), monkeypatch, options={"stream": True}, resume=checkpoint)
    rest = in_steps(rounds, 2, 16, begin=6)
    assert len(rest) == 5
    assert_goes_on(tmp_path / "whole", whole, tmp_path / "on", rest)


@pytest.mark.slow
def test_two_processes_of_a_stream_then_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = in_steps(train(tmp_path / "whole", (2, 2, 2), monkeypatch, options={"stream": True}), 2, 16)
    checkpoint = tmp_path / "whole" / "run" / "checkpoint-3"
    rounds = train(tmp_path / "one", (4, 2, 1), monkeypatch, options={"stream": True}, resume=checkpoint)
    assert_goes_on(tmp_path / "whole", whole, tmp_path / "one", in_steps(rounds, 2, 8, begin=6))


# Refusals

PLAIN = {**TRAINING, "task": "tests.support.tasks.parity_task:build", "report_to": "none", "num_train_epochs": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_harness(folder, {**PLAIN, "save_strategy": "steps", "save_steps": 5})
    return folder / "checkpoint-5"


def resume(checkpoint: Path, folder: Path, **changed: Any) -> int:
    reset()
    arguments = {**PLAIN, "output_dir": folder, "resume_from_checkpoint": checkpoint, **changed}
    return main([*as_flags(arguments), "--use_cpu"])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"per_device_train_batch_size": 4}, "a global batch of 8 samples: .*now 4 samples: "),
        ({"seed": 7, "allow_changed_arguments": True}, r"seed 42 \(now 7\)"),
        ({"task_args": {"size": 90}, "allow_changed_arguments": True}, r"num_samples 117 \(now 90\)"),
        ({"train_sampling_strategy": "sequential", "ignore_data_skip": True}, "random .now sequential."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_resume_whose_data_would_come_in_another_order_is_refused_unless_allowed(
    changed: dict[str, Any], says: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(trained, tmp_path / "out", **changed) == 2
    shown = capsys.readouterr().err
    assert shown.count("harness train: ") == 1
    assert re.search(says, shown)
    assert "--allow_changed_data_order" in shown
    assert not (tmp_path / "out").exists()
    allowed = {**changed, "allow_changed_data_order": True, "allow_changed_arguments": True}
    assert resume(trained, tmp_path / "out", **allowed) == 0
    assert capsys.readouterr().out.count("The data goes on in another order, checkpoint-5 was saved with ") == 1
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] > 5


def test_a_changed_global_batch_goes_on_where_its_own_run_would_be(trained: Path, tmp_path: Path) -> None:
    """Step 5 of 30, not step 10: what counts is the optimizer step, as for the Trainer."""
    assert resume(trained, tmp_path / "out", per_device_train_batch_size=4, allow_changed_data_order=True) == 0
    rows = history(tmp_path / "out")
    assert [row["step"] for row in rows[:-1]] == list(range(1, 31))
    assert rows[5]["epoch"] == pytest.approx(6 / 30)


def test_data_of_the_same_size_with_other_samples_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.tasks import parity_task

    whole = parity_task.VariableLength

    def changed(size: int, seed: int) -> Any:
        data = whole(size, seed)
        if seed == 7:
            data.samples[-1] = {**data.samples[-1], "input_ids": data.samples[-1]["input_ids"] + 0}
            data.samples[-1]["input_ids"][0] += 1
        return data

    monkeypatch.setattr(parity_task, "VariableLength", changed)
    assert resume(trained, tmp_path / "out") == 2
    assert "data_digest " in capsys.readouterr().err
