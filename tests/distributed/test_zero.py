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
from safetensors.torch import load_file
from torch.utils.cpp_extension import _get_build_directory
from transformers import AutoModelForCausalLM

from harness.checkpoint.layout import why_invalid
from harness.distributed.compiled_ops import OP
from harness.files import digest_of
from tests.support.launching import DDP, ROOT, SCRIPT, ZERO, launcher, run
from tests.support.parity import as_flags, history
from tests.support.two_processes import ARGUMENTS, finished, losses, rows, trained, weights

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed"),
]

ZERO1, ZERO2, ZERO3 = (ROOT / "launch_configs" / f"zero{stage}.yaml" for stage in (1, 2, 3))
WATCHED = {"report_to": "wandb", "wandb_mode": "offline", "wandb_watch": "all"}
# On which one process and two must agree: nothing is drawn at random, and the data is a multiple of a step's.
EXACT = {"task_args": {"dropout": 0.0, "size": 128}, "eval_strategy": "no", "save_strategy": "no", "logging_steps": 1}


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ZeRO-3 with all that there is divided: of itself DeepSpeed keeps parameters as small as these whole."""
    folder = tmp_path_factory.mktemp("config")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    content = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "train_batch_size": "auto", **auto}
    (folder / "deepspeed.json").write_text(json.dumps(content), encoding="utf-8")
    launch = ZERO3.read_text(encoding="utf-8").replace(
        "zero_stage: 3", f"deepspeed_config_file: {folder}/deepspeed.json"
    )
    (folder / "divided.yaml").write_text(launch.replace('mixed_precision: "no"\n', ""), encoding="utf-8")
    return folder / "divided.yaml"


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = {"logging_steps": 1, "max_steps": 101, "save_strategy": "no"}
    return finished(DDP, tmp_path_factory.mktemp("ddp"), ddp_find_unused_parameters=False, **more)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(ZERO2, tmp_path_factory.mktemp("zero"), max_steps=101)


@pytest.fixture(scope="module", params=[None, "bf16"], ids=["fp32", "bf16"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str | None, Path]:
    """One process on the whole batch, its gradients and parameters watched."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = {**ARGUMENTS, **EXACT, **WATCHED, "max_steps": 100, "output_dir": folder}
    arguments |= {"per_device_train_batch_size": 4, "expect_num_processes": 1}
    arguments |= {request.param: True} if request.param else {}
    assert run([sys.executable, SCRIPT, *as_flags(arguments), "--use_cpu"]).code == 0
    return request.param, folder


def resumed(config: Path, whole: Path, folder: Path, **more: Any) -> None:
    """From the middle of an epoch: the same history and weights, which `from_pretrained` loads."""
    (checkpoint,) = whole.glob("checkpoint-[1-9]0")
    shutil.copytree(checkpoint, folder / "run" / checkpoint.name)
    again = finished(config, folder, resume_from_checkpoint="true", **more)
    assert history(again) == history(whole)
    assert weights(again) == weights(whole)
    (last,) = (path.name for path in whole.glob("checkpoint-*") if path.name != checkpoint.name)
    assert weights(again / last) == weights(whole / last)
    assert why_invalid(again / last) is None
    model, saved = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (whole, whole / last))
    tokens = torch.arange(1, 33).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, saved(tokens).logits)


@pytest.mark.parametrize("name", [*(path.stem for path in ZERO), "divided"])
def test_each_launch_config_has_the_same_numbers_and_resumes_exactly(
    name: str, divided: Path, ddp: Path, tmp_path: Path
) -> None:
    config = divided if name == "divided" else ROOT / "launch_configs" / f"{name}.yaml"
    more = {"max_steps": 101, "save_steps": 50, "logging_steps": 1}
    found = finished(config, tmp_path / "whole", **more)
    assert torch.allclose(losses(found), losses(ddp), rtol=1e-6, atol=0)
    shutil.rmtree(found / "checkpoint-100")
    resumed(config, found, tmp_path / "again", **more)


@pytest.mark.parametrize("name", ["zero3", "divided"])
def test_each_gather_of_zero_3_is_waited_for(name: str, divided: Path, tmp_path: Path) -> None:
    """What DeepSpeed trains with, and what is gathered from it for a checkpoint, is complete."""
    more = {"max_steps": 3, "save_steps": 2, "eval_steps": 2, "logging_steps": 1, "logging_nan_inf_filter": False}
    config = divided if name == "divided" else ZERO3
    arguments = as_flags({"report_to": "none", **ARGUMENTS, **more, "output_dir": tmp_path / "run"})
    ended = run([*launcher(config), "-m", "tests.support.measuring.late_gathers", *arguments])
    assert ended.code == 0, ended.err[-3000:]
    found = tmp_path / "run"
    assert losses(found).isfinite().all()
    for folder in (found / "checkpoint-2", found / "checkpoint-3", found):
        whole = load_file(folder / "model.safetensors")
        assert not [name for name, weight in whole.items() if not weight.isfinite().all()], folder


@pytest.mark.parametrize("name", ["zero2", "divided"])
def test_a_resume_with_bf16_and_more_accumulation_is_exact(name: str, divided: Path, tmp_path: Path) -> None:
    config = divided if name == "divided" else ZERO2
    more = {"bf16": True, "gradient_accumulation_steps": 4, "max_steps": 16}
    resumed(config, finished(config, tmp_path / "whole", **more), tmp_path / "again", **more)


@pytest.mark.parametrize("name", ["zero2", "divided"])
def test_a_hundred_steps_and_their_histograms_are_those_of_one_process(
    name: str, alone: tuple[str | None, Path], divided: Path, tmp_path: Path
) -> None:
    precision, one = alone
    more = {**EXACT, **WATCHED, "max_steps": 100, **({precision: True} if precision else {})}
    found = finished(divided if name == "divided" else ZERO2, tmp_path, **more)
    assert len(losses(found)) == 100
    assert torch.allclose(losses(found), losses(one), rtol=2e-2 if precision else 1e-4, atol=0)
    if precision is None:
        same_histograms(rows(found), rows(one))


def same_histograms(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [set(row) for row in found] == [set(row) for row in expected]
    (watched,) = [i for i, row in enumerate(expected) if "gradients/transformer.wte.weight" in row]
    names = [name for name in expected[watched] if name.startswith(("gradients/", "parameters/"))]
    assert len(names) > 40
    for name in names:
        theirs, ours = expected[watched][name], found[watched][name]
        assert ours["bins"] == pytest.approx(theirs["bins"], rel=1e-3, abs=1e-5), name
        assert sum(ours["values"]) == sum(theirs["values"])
        moved = sum(abs(a - b) for a, b in zip(ours["values"], theirs["values"], strict=True)) / 2
        assert moved <= 0.02 * sum(theirs["values"]) + 1, name


def test_what_takes_the_whole_model_is_done_together_under_zero_3(divided: Path, tmp_path: Path) -> None:
    """Evaluation, generated samples in tables and at the end, the best model back: nobody waits for ever."""
    arguments = {
        **WATCHED,
        "config": "quickstart",
        "max_steps": 4,
        "logging_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the first one
        "max_train_samples": 32,
        "max_eval_samples": 8,
        "wandb_eval_samples": 2,
        "wandb_eval_samples_freq": 1,
        "bf16": True,
        "do_train": True,
        "do_eval": True,
        "output_dir": tmp_path,
    }
    ended = run([*launcher(divided), SCRIPT, *as_flags(arguments)])
    assert ended.code == 0, ended.err[-3000:]
    assert "sample: " in ended.out
    evaluations = [event["eval_loss"] for event in history(tmp_path) if "eval_loss" in event]
    results = json.loads((tmp_path / "all_results.json").read_text(encoding="utf-8"))
    assert evaluations[1] < evaluations[0] == pytest.approx(results["eval_loss"], rel=1e-3)
    assert weights(tmp_path) == weights(tmp_path / "checkpoint-2")
    assert any("sample_predictions" in row for row in rows(tmp_path))


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
    del manifest["sha256"]  # of the manifest itself; one of a version before has none
    (checkpoint / "harness_state.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_crafted_shard_is_refused_and_not_run(zero: Path, tmp_path: Path) -> None:
    shutil.copytree(zero / "checkpoint-20", tmp_path / "run" / "checkpoint-20")
    crafted(tmp_path / "run" / "checkpoint-20")
    ended = trained(ZERO2, tmp_path, resume_from_checkpoint="true", max_steps=101)
    assert ended.code != 0
    assert "optim_states.pt can't be loaded safely" in ended.err
    assert ended.err.count("harness train: ") == 1
    assert not list(ROOT.glob("executed"))


CRAFT = """
import sys, torch
content = torch.load(sys.argv[1], weights_only=False)
content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"] = torch.zeros(3)
torch.save(content, sys.argv[1])
"""


def test_a_state_in_a_shard_that_does_not_fit_is_refused_on_all_ranks(zero: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(zero / "checkpoint-20", tmp_path / "run" / "checkpoint-20")
    name = "global_step20/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    # In a process of its own: it imports DeepSpeed, which warns.
    assert run([sys.executable, "-c", CRAFT, str(checkpoint / name)]).code == 0
    manifest = json.loads((checkpoint / "harness_state.json").read_text(encoding="utf-8"))
    size, digest = (checkpoint / name).stat().st_size, digest_of(checkpoint / name)
    manifest["files"][name] = {"size": size, "sha256": digest}
    del manifest["sha256"]
    (checkpoint / "harness_state.json").write_text(json.dumps(manifest), encoding="utf-8")
    ended = trained(ZERO2, tmp_path, resume_from_checkpoint="true", max_steps=101)
    assert ended.code != 0
    assert "exp_avg of parameter 0 has the shape [3] instead of" in ended.err
    assert ended.err.count("harness train: ") == 1


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
    assert ended.err.count("harness train: ") == 1
    assert message in ended.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("zero_stage: 2", "zero_stage: 0", "zero_stage: 0 in the launch config is not supported"),
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
    assert ended.err.count("harness train: ") == 1


def test_a_launch_config_that_compiles_is_refused_with_its_line(tmp_path: Path) -> None:
    config = tmp_path / "launch.yaml"
    text = ZERO2.read_text(encoding="utf-8") + "dynamo_config:\n  dynamo_backend: INDUCTOR\n"
    config.write_text(text, encoding="utf-8")
    ended = trained(config, tmp_path, forked=False)
    assert ended.code != 0
    assert "asks for torch.compile (INDUCTOR), which is not supported with DeepSpeed" in ended.err
    assert f"change `dynamo_backend` in {config}, line {len(text.splitlines())}." in ended.err


def test_shards_are_read_by_as_many_processes_as_wrote_them(zero: Path, tmp_path: Path) -> None:
    more = {"per_device_train_batch_size": 4, "expect_num_processes": 1, "max_steps": 101}
    arguments = {"report_to": "none", **ARGUMENTS, **more, "resume_from_checkpoint": zero / "checkpoint-20"}
    command = [*launcher(ZERO2, "--num_processes=1"), SCRIPT, *as_flags(arguments), f"--output_dir={tmp_path / 'run'}"]
    ended = run(command)
    assert ended.code != 0
    assert "was saved by 2 processes, and as many have to read the shards" in ended.err


def test_one_process_too_removes_the_lock_of_a_killed_compilation(zero: Path, tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("the op is for CPU processes")
    compiled = Path(_get_build_directory(OP, verbose=False))  # by the training that `zero` is
    copied = tmp_path / compiled.parent.name / OP
    shutil.copytree(compiled, copied)
    lock = copied / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    arguments = {**ARGUMENTS, "report_to": "none", "expect_num_processes": 1, "max_steps": 1, "save_strategy": "no"}
    command = [*launcher(ZERO2, "--num_processes=1"), SCRIPT, *as_flags(arguments), f"--output_dir={tmp_path / 'run'}"]
    ended = run(command, TORCH_EXTENSIONS_DIR=str(copied.parent))
    assert ended.code == 0, ended.err[-3000:]
    assert f"Removed {lock}" in ended.err
