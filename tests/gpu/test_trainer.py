"""The Trainer's numbers on this device: the same losses, gradient norms and weights from the same flags."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.gpu.conftest import NeedsCard
from tests.support.parity import CASES, EVERY_EPOCH, TRAINING, assert_equal_runs, history, run_harness, run_trainer

CHOSEN = ("dropout, padding, masked labels", "bf16", "accumulation 2, ragged", "AdamW, not fused")
CHOSEN += ("gradient checkpointing", "workers", "max_steps inside an epoch")
SETTINGS = {name: CASES[name] for name in CHOSEN} | {
    "sdpa of a Llama, bf16": {"bf16": True, "gradient_accumulation_steps": 2, **EVERY_EPOCH},
}
OVERFLOWS = [3, 4, 9]  # backward passes
# Two compilations of a model may choose other kernels, which add up in another order; relative, of losses and norms.
COMPILED = 1e-4
pytestmark = pytest.mark.usefixtures("deterministic")


def compare(
    folder: Path, device: str, arguments: dict[str, Any], record: Any, *, bound: float = 0.0, **given: Any
) -> None:
    """Train by the Trainer and by ours; record how far they are apart, and bear `bound`."""
    epochs = 2 if device == "cuda" else 1
    arguments = {**TRAINING, "num_train_epochs": epochs, "full_determinism": True, **arguments}
    run_trainer(folder / "trainer", arguments, device=device, **given)
    run_harness(folder / "ours", arguments, device=device, **given)
    apart = differences(folder / "trainer", folder / "ours")
    for name, value in apart.items():
        record(f"{name} apart", f"{value:.1e}" if value else 0)
    if bound:
        assert max(apart.values()) <= bound
    else:
        assert_equal_runs(folder / "trainer", folder / "ours")


def differences(reference: Path, ours: Path) -> dict[str, float]:
    """The largest relative differences of what is reported, and the largest of a weight."""
    found = {}
    expected, got = history(reference), history(ours)
    for name in ("loss", "grad_norm", "eval_loss"):
        pairs = zip(expected, got, strict=False)
        found[name] = max((apart(a[name], b[name]) for a, b in pairs if name in a and name in b), default=0.0)
    weights, others = (load_file(folder / "model.safetensors") for folder in (reference, ours))
    found["a weight"] = max((weights[name] - others[name]).abs().max().item() for name in weights)
    return found


def apart(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b) / abs(a) if math.isfinite(a) and math.isfinite(b) else math.inf


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_are_the_trainers(name: str, device: str, tmp_path: Path, record_property: Any) -> None:
    task_config = {"task_args": {"llama": "Llama" in name}}
    compare(tmp_path, device, SETTINGS[name], record_property, task_config=task_config)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_numbers_of_fp16_with_overflows_are_the_trainers(
    optim: str, device: str, needs_card: NeedsCard, tmp_path: Path, record_property: Any
) -> None:
    arguments = {"optim": optim, "fp16": device == "cuda", "gradient_accumulation_steps": 2}
    task_config = {"task_args": {"at": OVERFLOWS if device == "cuda" else []}}
    task = "tests.support.tasks.card_tasks:overflowing"
    compare(tmp_path, device, arguments, record_property, task=task, task_config=task_config)
    needs_card("fp16's loss scaler")
    norms = [entry["grad_norm"] for entry in history(tmp_path / "ours") if "grad_norm" in entry]
    assert sum(math.isinf(norm) for norm in norms) >= 2, "none overflowed, so nothing was compared"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_numbers_of_a_compiled_model_are_the_trainers(device: str, tmp_path: Path, record_property: Any) -> None:
    on_card = device == "cuda"  # inductor takes a minute on a CPU
    arguments = {"torch_compile_backend": "inductor" if on_card else "eager", "max_steps": 6}
    # Blocks of one length: each other one is compiled again.
    sizes = "n_positions=32,n_embd=64,n_layer=1,n_head=2"
    task_config = {"model_type": "gpt2", "config_overrides": sizes, "block_size": 32}
    task = "harness.tasks.quickstart:build"
    compare(tmp_path, device, arguments, record_property, bound=COMPILED * on_card, task=task, task_config=task_config)
