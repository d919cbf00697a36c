"""A task's build_optimizer: groups or an optimizer of its own, resumed to the bit, and what is refused beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from safetensors.torch import load_file

from harness.train import main
from tests.support.launching import DDP, ROOT, SCRIPT, needs_fsdp, run
from tests.support.launching import FSDP2 as FSDP
from tests.support.parity import TRAINING, as_flags, assert_equal_weights, history, reset, run_harness
from tests.support.two_processes import finished, trained

TASK = "tests.support.tasks.hooked_task:build"
SHORT: dict[str, Any] = {**TRAINING, "max_steps": 12, "logging_steps": 1, "save_strategy": "steps", "save_steps": 5}
# The flags that the optimizer of each has a use for.
OWN: dict[str, dict[str, Any]] = {
    "groups": {"weight_decay": 0.1, "optim": "adamw_torch", "adam_beta2": 0.9},
    "momentum": {"learning_rate": None},
    "unknown": {"learning_rate": None},
}


def flags_of(name: str, **more: Any) -> dict[str, Any]:
    given = {**SHORT, **OWN.get(name, {}), "task_args": {"build_optimizer": name}, **more}
    return {flag: value for flag, value in given.items() if value is not None}


def refused(folder: Path, capsys: pytest.CaptureFixture[str], **arguments: Any) -> str:
    reset()
    assert main(as_flags({**arguments, "task": TASK, "report_to": "none", "output_dir": folder, "use_cpu": True})) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("harness train: ")]
    return line


@pytest.mark.parametrize("name", OWN)
def test_an_optimizer_of_ones_own_trains_and_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    run_harness(tmp_path / "whole", flags_of(name), task=TASK)
    events = history(tmp_path / "whole")
    resumed = flags_of(name, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-5")
    run_harness(tmp_path / "on", resumed, task=TASK)
    assert history(tmp_path / "on") == events
    assert_equal_weights(tmp_path / "whole", tmp_path / "on")


def test_groups_take_from_the_flags_what_they_do_not_say(tmp_path: Path) -> None:
    run_harness(tmp_path / "run", flags_of("groups", lr_scheduler_type="constant"), task=TASK)
    saved = torch.load(tmp_path / "run" / "checkpoint-10" / "optimizer.pt", weights_only=True)
    found = [(group["lr"], group["weight_decay"], group["betas"]) for group in saved["param_groups"]]
    assert found == [(2e-3, 0.1, (0.9, 0.9)), (5e-4, 0.1, (0.9, 0.9)), (2e-3, 0.0, (0.9, 0.9))]


def test_what_is_in_no_group_is_not_trained(tmp_path: Path) -> None:
    run_harness(tmp_path / "none", flags_of("head", max_steps=1, learning_rate=0.0), task=TASK)
    run_harness(tmp_path / "head", flags_of("head"), task=TASK)
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("none", "head"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"transformer.ln_f.bias", "transformer.ln_f.weight"}


def test_the_model_card_names_it(tmp_path: Path) -> None:
    run_harness(tmp_path / "run", flags_of("momentum", max_steps=2), task=TASK)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "optimizer: Use SGD of the task's build_optimizer" in card
    assert "learning_rate" not in card


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("momentum", {"learning_rate": 1e-3}, "--learning_rate=0.001 does nothing here: the task's build_optimizer"),
        ("momentum", {"optim": "adafactor"}, "--optim=adafactor does nothing here: "),
        ("momentum", {"weight_decay": 0.1}, "--weight_decay=0.1 does nothing here: "),
        ("momentum", {"optim_args": "a=1"}, "--optim_args=a=1 does nothing here: "),
        ("own", {"weight_decay": 0.1}, "returned groups that all have their own weight_decay"),
        ("own", {"learning_rate": 1e-3}, "returned groups that all have their own lr"),
        ("copy", {}, "returned SGD: 28 of its 28 parameters are not of the model that the function was given"),
        ("none", {}, "hooked_task.<lambda>) returned None"),
        ("names", {}, "returned a list: return a list of parameter groups, as in [{'params': "),
        ("empty", {}, "returned no parameter groups"),
        ("closure", {}, "returned LBFGS, whose step needs a closure"),
        ("groups", {"optim": "galore_adamw", "optim_target_modules": "attn"}, "--optim=galore_adamw: "),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, flags: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"task_args": {"build_optimizer": name}, "max_steps": 2, **flags}
    assert message in refused(tmp_path / "run", capsys, **given)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_harness(tmp_path / "run", flags_of("momentum", max_steps=5), task=TASK)
    checkpoint, changed = tmp_path / "run" / "checkpoint-5", {"allow_changed_arguments": True}
    again = flags_of("unknown", resume_from_checkpoint=checkpoint, **changed)
    message = refused(tmp_path / "on", capsys, **again)
    assert "was saved with the optimizer SGD of the task's build_optimizer, not HalfSteps of " in message
    again = flags_of("none", task_args={}, resume_from_checkpoint=checkpoint, **changed)
    assert "build_optimizer, not adamw_torch" in refused(tmp_path / "on", capsys, **again)


@pytest.mark.slow
@pytest.mark.parametrize("config", [DDP, pytest.param(FSDP, marks=needs_fsdp)], ids=lambda path: path.stem)
@pytest.mark.parametrize("name", OWN)
def test_two_processes_train_and_resume_with_it(config: Path, name: str, tmp_path: Path) -> None:
    trains_and_resumes(config, name, tmp_path)


needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")


@pytest.mark.deepspeed
@pytest.mark.timeout(900)
@needs_deepspeed
@pytest.mark.parametrize(("stage", "name"), [(2, "groups"), (3, "groups"), (2, "unknown"), (3, "momentum")])
def test_zero_trains_and_resumes_with_it(stage: int, name: str, tmp_path: Path) -> None:
    trains_and_resumes(ROOT / "launch_configs" / f"zero{stage}.yaml", name, tmp_path)


@pytest.mark.deepspeed
@needs_deepspeed
def test_zero_refuses_what_goes_by_shapes(tmp_path: Path) -> None:
    config = ROOT / "launch_configs" / "zero2.yaml"
    ended = trained(config, tmp_path, **two(), learning_rate=None, task_args={"build_optimizer": "Adafactor"})
    assert ended.code != 0
    assert "returned Adafactor: Adafactor goes by the shapes of parameters" in ended.err


def two() -> dict[str, Any]:
    return {"task": TASK, "max_steps": 6, "save_steps": 4, "eval_strategy": "no"}


def trains_and_resumes(config: Path, name: str, folder: Path) -> None:
    """On two processes; each step's loss is that of the same global batches on one."""
    arguments = {**two(), **OWN[name], "task_args": {"build_optimizer": name, "dropout": 0.0}}
    folder_of_two = finished(config, folder, **arguments)
    events = history(folder_of_two)
    assert trained(config, folder, **arguments, resume_from_checkpoint=folder_of_two / "checkpoint-4").code == 0
    assert history(folder_of_two) == events
    alone = {**TRAINING, **arguments, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    alone |= {"max_grad_norm": 0.9}
    alone |= {"report_to": "none", "output_dir": folder / "alone", "save_strategy": "no", "use_cpu": True}
    given = {flag: value for flag, value in alone.items() if value is not None}
    ended = run([sys.executable, SCRIPT, *as_flags(given)])
    assert ended.code == 0, ended.err[-2000:]
    expected = [event["loss"] for event in history(folder / "alone") if "loss" in event]
    assert [event["loss"] for event in events if "loss" in event] == pytest.approx(expected, rel=1e-3)
