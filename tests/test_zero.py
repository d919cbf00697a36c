"""DeepSpeed's real engine on two CPU processes: the numbers of DDP, exact resumes, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from transformers import AutoModelForCausalLM

from harness.checkpoint import why_invalid
from harness.tracking.journal import COLUMNS
from tests.support.parity import TIMING, TRAINING, as_flags, history
from tests.test_launch import DDP, ROOT, SCRIPT, Ended, launcher, run

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed"),
]

CONFIGS = sorted(path for path in (ROOT / "launch_configs").glob("zero*.yaml"))
ZERO1, ZERO2, OFFLOADED = (ROOT / "launch_configs" / f"{name}.yaml" for name in ("zero1", "zero2", "zero2_offload"))
ARGUMENTS: dict[str, Any] = {
    **TRAINING,
    "task": "tests.support.parity_task:build",
    "task_args": {"random_collator": True},
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 24,
    "max_grad_norm": 0.9,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "save_strategy": "steps",
    "save_steps": 10,
    "expect_num_processes": 2,
}


def trained(config: Path, folder: Path, **more: Any) -> Ended:
    arguments = {"report_to": "none", "output_dir": folder / "run", **ARGUMENTS, **more}
    return run([*launcher(config), SCRIPT, *as_flags({k: v for k, v in arguments.items() if v is not None})])


def finished(config: Path, folder: Path, **more: Any) -> Path:
    ended = trained(config, folder, **more)
    assert ended.code == 0, ended.err[-3000:]
    assert ended.out.count("step 1/") <= 1, "one rank speaks"
    assert "lr_scheduler.step" not in ended.err
    return folder / "run"


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([event["loss"] for event in history(folder) if "loss" in event], dtype=torch.float64)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in COLUMNS and not TIMING.search(name)}
        for line in lines
    ]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = {"report_to": "wandb", "wandb_mode": "offline", "wandb_watch": "all", "logging_steps": 1}
    return finished(DDP, tmp_path_factory.mktemp("ddp"), ddp_find_unused_parameters=False, max_steps=101, **more)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = {"report_to": "wandb", "wandb_mode": "offline", "wandb_watch": "all", "logging_steps": 1}
    return finished(ZERO2, tmp_path_factory.mktemp("zero"), max_steps=101, **more)


def test_zero_2_has_ddps_numbers_and_histograms(ddp: Path, zero: Path) -> None:
    assert torch.allclose(losses(zero), losses(ddp), rtol=1e-6, atol=0)
    found, expected = rows(zero), rows(ddp)
    assert [set(row) for row in found] == [set(row) for row in expected]
    (watched,) = [i for i, row in enumerate(expected) if "gradients/transformer.wte.weight" in row]
    names = [name for name in expected[watched] if name.startswith(("gradients/", "parameters/"))]
    assert len(names) > 40
    for name in names:
        theirs, ours = expected[watched][name], found[watched][name]
        assert ours["bins"] == pytest.approx(theirs["bins"], rel=1e-4, abs=1e-6), name
        assert sum(ours["values"]) == sum(theirs["values"])
        moved = sum(abs(a - b) for a, b in zip(ours["values"], theirs["values"], strict=True)) / 2
        assert moved <= 0.01 * sum(theirs["values"]) + 1, name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_launch_config_has_the_same_numbers(config: Path, ddp: Path, tmp_path: Path) -> None:
    found = finished(config, tmp_path, max_steps=101, save_strategy="no", logging_steps=1)
    assert torch.allclose(losses(found), losses(ddp), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("precision", "bound"), [(None, 1e-4), ("bf16", 2e-2)])
def test_a_hundred_steps_are_those_of_one_process(precision: str | None, bound: float, tmp_path: Path) -> None:
    more = {"task_args": {"dropout": 0.0, "size": 128}, "max_steps": 100, "eval_strategy": "no", "save_strategy": "no"}
    more |= {precision: True} if precision else {}
    found = finished(ZERO2, tmp_path / "zero", **more)
    alone = {**ARGUMENTS, **more, "per_device_train_batch_size": 4, "expect_num_processes": 1}
    alone |= {"output_dir": tmp_path / "one", "report_to": "none"}
    assert run([sys.executable, SCRIPT, *as_flags(alone), "--use_cpu"]).code == 0
    assert len(losses(found)) == 100
    assert torch.allclose(losses(found), losses(tmp_path / "one"), rtol=bound, atol=0)


@pytest.mark.parametrize(
    ("config", "more"),
    [(ZERO2, {"bf16": True, "gradient_accumulation_steps": 4}), (ZERO1, {}), (OFFLOADED, {})],
    ids=["zero2-bf16-4", "zero1", "zero2-offload"],
)
def test_a_resume_in_mid_epoch_is_exact(config: Path, more: dict[str, Any], tmp_path: Path) -> None:
    whole = finished(config, tmp_path / "whole", **more)
    (tmp_path / "again").mkdir()
    shutil.copytree(whole / "checkpoint-10", tmp_path / "again" / "run" / "checkpoint-10")
    again = finished(config, tmp_path / "again", resume_from_checkpoint="true", **more)
    assert history(again) == history(whole)
    assert weights(again) == weights(whole)
    assert weights(again / "checkpoint-20") == weights(whole / "checkpoint-20")
    assert why_invalid(again / "checkpoint-20") is None
    model = AutoModelForCausalLM.from_pretrained(whole)
    saved = AutoModelForCausalLM.from_pretrained(whole / "checkpoint-20")
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in saved.named_parameters()}


def test_a_checkpoint_holds_the_trainers_layout(zero: Path) -> None:
    names = {path.relative_to(zero / "checkpoint-20").as_posix() for path in (zero / "checkpoint-20").rglob("*")}
    shards = {f"global_step20/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)}
    assert shards | {"latest", "global_step20/mp_rank_00_model_states.pt", "scheduler.pt", "rng_state_1.pth"} <= names
    assert "optimizer.pt" not in names
    listed = json.loads((zero / "checkpoint-20" / "harness_state.json").read_text(encoding="utf-8"))["files"]
    assert shards <= set(listed)
    assert len(json.loads((zero / "trainer_state.json").read_text())["log_history"]) > 100


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def crafted(checkpoint: Path) -> None:
    name = "global_step20/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (checkpoint / name).write_bytes(data := pickle.dumps(Payload()))
    manifest = json.loads((checkpoint / "harness_state.json").read_text(encoding="utf-8"))
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "harness_state.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_crafted_shard_is_refused_and_not_run(zero: Path, tmp_path: Path) -> None:
    shutil.copytree(zero / "checkpoint-20", tmp_path / "run" / "checkpoint-20")
    crafted(tmp_path / "run" / "checkpoint-20")
    ended = trained(ZERO2, tmp_path, resume_from_checkpoint="true", max_steps=101)
    assert ended.code != 0
    assert "optim_states.pt can't be loaded safely" in ended.err
    assert ended.err.count("harness-train: ") == 1
    assert not list(ROOT.glob("executed"))


def test_a_damaged_shard_is_passed_over(zero: Path, tmp_path: Path) -> None:
    for step in (10, 20):
        shutil.copytree(zero / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    shard = tmp_path / "run" / "checkpoint-20" / "global_step20" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:-100])
    ended = trained(ZERO2, tmp_path, resume_from_checkpoint="true", max_steps=12, allow_changed_arguments=True)
    assert "Passed over checkpoint-20: zero_pp_rank_0_mp_rank_00_optim_states.pt has" in ended.err
    assert "checkpoint-10" in ended.err + ended.out


WRONG: dict[str, tuple[Path, dict[str, Any], str]] = {
    "without DeepSpeed": (DDP, {}, "was saved with DeepSpeed ZeRO-2, not no DeepSpeed"),
    "another stage": (ZERO1, {}, "was saved with DeepSpeed ZeRO-2, not DeepSpeed ZeRO-1"),
    "compiled": (ZERO2, {"torch_compile": True}, "--torch_compile is not supported with DeepSpeed"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_go_together_is_refused(what: str, zero: Path, tmp_path: Path) -> None:
    config, more, message = WRONG[what]
    ended = trained(config, tmp_path, max_steps=101, resume_from_checkpoint=zero / "checkpoint-20", **more)
    assert ended.code != 0
    assert ended.err.count("harness-train: ") == 1
    assert message in ended.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("zero_stage: 2", "zero_stage: 3", "zero_stage: 3 in the launch config is not supported"),
        (
            "zero_stage: 2",
            "zero_stage: 2\n  gradient_accumulation_steps: 3",
            "gradient_accumulation_steps: 3 in DeepSpeed's configuration contradicts --gradient_accumulation_steps 2",
        ),
        (
            "zero_stage: 2",
            "zero_stage: 2\n  gradient_clipping: 0.5",
            "gradient_clipping: 0.5 in DeepSpeed's configuration contradicts --max_grad_norm 0.9",
        ),
    ],
)
def test_a_launch_config_that_contradicts_the_flags_is_refused(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(ZERO2.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    ended = trained(config, tmp_path)
    assert ended.code != 0
    assert message in ended.err
    assert ended.err.count("harness-train: ") == 1


def test_shards_are_read_by_as_many_processes_as_wrote_them(zero: Path, tmp_path: Path) -> None:
    more = {"per_device_train_batch_size": 4, "expect_num_processes": 1, "max_steps": 101}
    arguments = {"report_to": "none", **ARGUMENTS, **more, "resume_from_checkpoint": zero / "checkpoint-20"}
    command = [*launcher(ZERO2, "--num_processes=1"), SCRIPT, *as_flags(arguments), f"--output_dir={tmp_path / 'run'}"]
    ended = run(command)
    assert ended.code != 0
    assert "was saved by 2 processes, and as many have to read the shards" in ended.err
