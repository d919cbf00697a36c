"""Other arguments than those of a checkpoint: every flag is judged, and what decides the numbers is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint.arguments import RESOLVED, Changes, recorded
from harness.checkpoint.arguments import compare as compare_flags
from harness.config import arg, flags_of, section
from harness.flags import FLAGS, parse
from harness.train import main
from tests.support.parity import TRAINING, as_flags, assert_equal_weights, history, reset, run_harness, run_trainer

KINDS = {**RESOLVED} | {name: flag.on_resume for name, flag in FLAGS.items()}


def compare(saved: dict[str, Any], now: dict[str, Any]) -> Changes:
    return compare_flags(saved, now, FLAGS)


def test_every_flag_says_what_a_resume_makes_of_it() -> None:
    assert set(KINDS.values()) == {"unrelated", "free", "checked", "refused"}
    # Where nobody has judged a change, it is refused.
    assert flags_of(Unjudged)["number"].on_resume == "refused"


@section("unjudged")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Unjudged:
    number: int = arg(1, "A number.")


def test_arguments_are_plain_json_without_secrets() -> None:
    flags = parse(["--train_file=x.txt", "--token=hf_abc", '--task_args={"a": [1], "api_key": "k", "b_token": "t"}'])
    found = recorded(flags.flat(), device="cpu")
    text = json.dumps(found)
    assert json.loads(text) == found
    assert not {"hf_abc", '"k"', '"t"'} & set(text.replace(",", " ").replace("}", " ").split())
    assert found["task_args"]["a"] == [1]
    assert found["device"] == "cpu"


def arguments(**changed: Any) -> dict[str, Any]:
    resolved = {"mixed_precision": "no", "device": "cpu", "num_processes": 1, "total_steps": 20}
    return json.loads(json.dumps(recorded(parse(["--train_file=x.txt"]).flat(), **resolved))) | changed


def test_equal_arguments_and_those_of_a_trainer_say_nothing() -> None:
    assert compare(arguments(), arguments()).told == compare({}, arguments()).told == ()


@pytest.mark.parametrize("name", sorted(KINDS))
def test_each_flag_is_told_and_refused_as_its_class_says(name: str) -> None:
    longer = {"max_steps": 30, "num_train_epochs": 30.0, "total_steps": 30}
    found = compare(arguments(), arguments(**{name: longer.get(name, "another")}))
    assert len(found.told) == (KINDS[name] != "unrelated")
    assert len(found.refused) == (KINDS[name] == "refused")


def test_what_differs_is_named_with_both_values() -> None:
    found = compare(arguments(eval_steps=None), arguments(eval_steps=10, learning_rate=0.5))
    assert set(found.told) == {"eval_steps none -> 10", "learning_rate 5e-05 -> 0.5"}
    assert found.refused == ("learning_rate 5e-05 -> 0.5",)


@pytest.mark.parametrize(("total", "refused"), [(30, ()), (20, ()), (10, ("total_steps 20 -> 10",))])
def test_a_longer_run_is_a_wish_and_a_shorter_one_is_refused(total: int, refused: tuple[str, ...]) -> None:
    assert compare(arguments(), arguments(max_steps=total, total_steps=total)).refused == refused
    # Of a changed global batch or data set, which are refused by other means.
    assert compare(arguments(), arguments(total_steps=total)).refused == ()


def test_flags_of_another_version_say_nothing() -> None:
    older = {name: value for name, value in arguments().items() if name != "learning_rate"}
    assert compare(older, arguments(learning_rate=1.0)).told == ()
    assert compare({**arguments(), "gone": 1}, arguments()).told == ()


# Whole runs

SAVING = {**TRAINING, "max_steps": 8, "save_strategy": "steps", "save_steps": 4}
TASK = {"task": "tests.support.tasks.parity_task:build", "report_to": "none"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_harness(folder, SAVING)
    return folder


def resume(trained: Path, folder: Path, **changed: Any) -> int:
    reset()
    given = {**SAVING, **TASK, "output_dir": folder, "resume_from_checkpoint": trained / "checkpoint-4", **changed}
    return main([*as_flags(given), "--use_cpu"])


def test_changed_arguments_are_refused_all_at_once_and_taken_when_allowed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {"learning_rate": 1e-3, "max_grad_norm": 0.5, "logging_steps": 2}
    assert resume(trained, tmp_path / "out", **changed) == 2
    shown = capsys.readouterr().err
    assert shown.count("harness train: ") == 1
    assert "learning_rate 0.002 -> 0.001, max_grad_norm 1.0 -> 0.5)" in shown
    assert "logging_steps" not in shown
    assert "--allow_changed_arguments" in shown
    assert not (tmp_path / "out").exists()
    assert resume(trained, tmp_path / "out", **changed, allow_changed_arguments=True) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "Other arguments" in line]
    assert len(told) == 1
    for change in ("learning_rate 0.002 -> 0.001", "max_grad_norm 1.0 -> 0.5", "logging_steps 1.0 -> 2.0"):
        assert change in told[0]
    # The permission is for this resume: the folder's configuration does not pass it on.
    assert "allow_changed" not in (tmp_path / "out" / "harness_config.yaml").read_text(encoding="utf-8")


def test_what_may_change_changes_no_weight(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = {"logging_steps": 3, "save_steps": 5, "save_total_limit": 1, "dataloader_pin_memory": False}
    assert resume(trained, tmp_path / "out", **free) == 0
    assert "save_steps 4.0 -> 5.0" in capsys.readouterr().out
    assert_equal_weights(trained, tmp_path / "out")


def test_a_precision_and_an_earlier_end_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(trained, tmp_path / "out", bf16=True, max_steps=6) == 2
    shown = capsys.readouterr().err
    assert "mixed_precision no -> bf16" in shown
    assert "total_steps 8 -> 6" in shown


def test_a_run_from_before_there_was_a_choice_goes_on_with_the_trainers_loss(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = shutil.copytree(trained, tmp_path / "older")
    manifest = older / "checkpoint-4" / "harness_state.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    assert content.pop("loss") == {"sums": True, "means": False, "by": "tokens"}
    assert content["arguments"].pop("loss_scaling") == "global"
    del content["sha256"]  # of the manifest itself; one of a version before has none
    manifest.write_text(json.dumps(content), encoding="utf-8")
    assert resume(older, tmp_path / "out") == 2
    assert "loss_scaling trainer -> global" in capsys.readouterr().err
    assert resume(older, tmp_path / "out", loss_scaling="trainer") == 0


def test_a_checkpoint_without_arguments_is_compared_with_nothing(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    manifest = tmp_path / "checkpoint-4" / "harness_state.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    assert content.pop("arguments")["learning_rate"] == SAVING["learning_rate"]
    del content["sha256"]
    manifest.write_text(json.dumps(content), encoding="utf-8")
    assert resume(tmp_path, tmp_path / "out", learning_rate=1e-3) == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr_scheduler_type": "cosine", "warmup_steps": 0.2},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}},
    ],
    ids=lambda options: options.get("lr_scheduler_type", "linear"),
)
@pytest.mark.parametrize("longer", [{"max_steps": 20}, {"max_steps": -1, "num_train_epochs": 2}], ids=" ".join)
def test_a_longer_run_is_the_trainers_longer_run(options: dict[str, Any], longer: Any, tmp_path: Path) -> None:
    arguments = {**SAVING, **options}
    run_trainer(tmp_path / "trainer", arguments)
    run_harness(tmp_path / "ours", arguments)
    assert_equal_weights(tmp_path / "trainer", tmp_path / "ours")
    for step in (4, 8):
        theirs, ours = tmp_path / f"trainer-{step}", tmp_path / f"ours-{step}"
        run_trainer(theirs, {**arguments, **longer}, resume=str(tmp_path / "trainer" / f"checkpoint-{step}"))
        checkpoint = tmp_path / "ours" / f"checkpoint-{step}"
        run_harness(ours, {**arguments, **longer, "resume_from_checkpoint": checkpoint})
        assert len(history(ours)) > 16
        assert history(ours)[:-1] == history(theirs)[:-1]
        assert_equal_weights(theirs, ours)
