"""One process under each launch config: it trains, saves, goes on to the bit, and `from_pretrained` loads the end."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from harness.checkpoint.layout import SCALER_FILE, why_invalid
from harness.distributed.precision import FP8_CAPABILITY
from tests.gpu.conftest import NeedsCard
from tests.support.launching import DDP, FP16, ROOT, SCRIPT, Ended, flags, launcher, run
from tests.support.parity import TRAINING, assert_equal_runs, history, run_harness

SAVED, LAST = 4, 8
ARGUMENTS: dict[str, Any] = {
    **TRAINING,
    "gradient_accumulation_steps": 2,
    "max_steps": LAST,
    "save_strategy": "steps",
    "save_steps": SAVED,
    "full_determinism": True,
    "expect_num_processes": 1,
}
IN_BF16 = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2", "fsdp2_offload", "ddp")
IN_FP16 = ("zero2", "fsdp2", "ddp")
CASES = [*((name, "bf16") for name in IN_BF16), *((name, "fp16") for name in IN_FP16)]


def trained(name: str, folder: Path, **arguments: Any) -> Ended:
    command = launcher(ROOT / "launch_configs" / f"{name}.yaml", "--num_processes=1")
    return run([*command, SCRIPT, *flags(folder, {**ARGUMENTS, **arguments})], NCCL_DEBUG="VERSION")


def whole_and_resumed(name: str, precision: str, folder: Path) -> tuple[Ended, Path, Path]:
    """How the first training ended, its folder, and that of one that went on from its first checkpoint."""
    whole, again = folder / "whole", folder / "again"
    ended = trained(name, whole, **{precision: True})
    assert ended.code == 0, ended.err[-3000:]
    shutil.copytree(whole / f"checkpoint-{SAVED}", again / f"checkpoint-{SAVED}")
    resumed = trained(name, again, **{precision: True}, resume_from_checkpoint="true")
    assert resumed.code == 0, resumed.err[-3000:]
    return ended, whole, again


@pytest.fixture(scope="module")
def started(
    request: pytest.FixtureRequest, device: str, processes: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[tuple[Ended, Path, Path]]]]:
    """Of the chosen cases those that can be tried here, several at once: they mostly import and wait."""
    chosen = {item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")}
    possible = [(name, precision) for name, precision in CASES if precision == "bf16" or device == "cuda"]
    if not is_deepspeed_available():
        possible = [case for case in possible if not case[0].startswith("zero")]
    with ThreadPoolExecutor(max(2, min(6, (os.cpu_count() or 1) // 2))) as pool:
        yield {
            case: pool.submit(whole_and_resumed, *case, tmp_path_factory.mktemp("-".join(case)))
            for case in possible
            if case in chosen
        }
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def plain(device: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same training without a launcher, in a precision."""

    @lru_cache
    def trained(precision: str) -> Path:
        folder = tmp_path_factory.mktemp("plain") / precision
        run_harness(folder, {**ARGUMENTS, "save_strategy": "no", precision: True}, device=device)
        return folder

    return trained


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in history(folder) if "loss" in event]


@pytest.mark.parametrize("case", CASES, ids=" in ".join)
def test_one_process_trains_resumes_to_the_bit_and_its_model_loads(
    case: tuple[str, str],
    started: dict[tuple[str, str], Future[tuple[Ended, Path, Path]]],
    plain: Callable[[str], Path],
    device: str,
    deterministic: None,
    needs_card: NeedsCard,
) -> None:
    name, precision = case
    if name.startswith("zero") and not is_deepspeed_available():
        pytest.skip("deepspeed is not installed")
    if precision == "fp16":
        needs_card("fp16")
    expected = plain(precision)
    ended, whole, again = started[case].result()
    if name == "ddp":
        assert ("NCCL version" in ended.out + ended.err) == (device == "cuda")
    # On a card dropout draws in another way for numbers of another size.
    assert losses(whole) == pytest.approx(losses(expected), rel=1e-3 if device == "cpu" else 2e-2)
    assert_equal_runs(whole, again)
    for step in (SAVED, LAST):
        checkpoint = whole / f"checkpoint-{step}"
        assert why_invalid(checkpoint) is None
        assert (checkpoint / SCALER_FILE).is_file() == (precision == "fp16" and not name.startswith("zero"))
    model, info = AutoModelForCausalLM.from_pretrained(again, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weights, saved = (load_file(folder / "model.safetensors") for folder in (again, whole / f"checkpoint-{LAST}"))
    assert all(torch.equal(tensor, weights[key]) for key, tensor in saved.items())
    assert torch.equal(model.transformer.wte.weight, weights["transformer.wte.weight"])


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_fp8_trains_and_is_saved_as_an_ordinary_model(
    device: str, processes: None, tmp_path: Path, needs_card: NeedsCard
) -> None:
    needs_card("fp8")
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("fp8 needs an Ada or Hopper GPU")
    arguments = {"max_steps": 4, "logging_steps": 1, "save_steps": 4}
    command = launcher(DDP, "--num_processes=1", "--mixed_precision=fp8")
    ended = run([*command, SCRIPT, *flags(tmp_path / "out", arguments)])
    assert ended.code == 0, ended.err[-3000:]
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_launch_config_of_fp16_counts_what_is_skipped(
    device: str, processes: None, tmp_path: Path, needs_card: NeedsCard
) -> None:
    arguments = {"max_steps": 4, "logging_steps": 1, "save_steps": 4, "report_to": "wandb", "wandb_mode": "offline"}
    command = launcher(FP16, "--num_processes=1")
    if device == "cpu":
        refused = run([*command, SCRIPT, *flags(tmp_path / "out", arguments)])
        assert "harness train: fp16 needs an accelerator; use bf16" in refused.err
    needs_card("fp16")
    ended = run([*command, SCRIPT, *flags(tmp_path / "out", arguments)])
    assert ended.code == 0, ended.err[-3000:]
    assert (tmp_path / "out" / "checkpoint-4" / SCALER_FILE).is_file()
    assert '"train/num_skipped_steps"' in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")
