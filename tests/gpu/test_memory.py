"""What saves memory or time on a card changes the numbers by no more than rounding, and saves what it should."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from harness.train import main
from tests.gpu.conftest import NeedsCard
from tests.support.parity import history, reset

TINY = "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2,num_key_value_heads=2"
LLAMA = "hidden_size=512,intermediate_size=1536,num_hidden_layers=8,num_attention_heads=8,num_key_value_heads=8"
SIZES = {
    "cpu": {"config_overrides": f"{TINY},max_position_embeddings=64", "block_size": 32},
    "cuda": {"config_overrides": f"{LLAMA},max_position_embeddings=1024,vocab_size=8192", "block_size": 1024},
}
COMMON = {
    "task": "tests.support.tasks.card_tasks:without_sample",
    "model_type": "llama",
    "max_steps": 6,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "report_to": "none",
}
CLOSE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of each loss
CHECKPOINTING = "--activation_checkpointing"
OFFLOAD = '--activation_checkpointing_kwargs={"offload": true}'
LORA = ("--lora_r=8", "--lora_dropout=0", "--lora_target_modules=all-linear")


@dataclass(frozen=True)
class Trained:
    """What a training came to: its losses, the peak of the card's memory in GiB (0 on a CPU), its seconds."""

    losses: list[float]
    peak: float
    seconds: float


Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def train(device: str, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A function that trains with some flags, once for all tests."""
    known: dict[tuple[str, ...], Trained] = {}

    def find(*flags: str) -> Trained:
        if flags not in known:
            known[flags] = run(tmp_path_factory.mktemp("memory") / "out", device, *flags)
        return known[flags]

    return find


def run(folder: Path, device: str, *flags: str) -> Trained:
    reset()
    free(device)
    given = [f"--{name}={value}" for name, value in (COMMON | SIZES[device]).items()]
    began = time.monotonic()
    assert main([*given, f"--output_dir={folder}", f"--use_cpu={device == 'cpu'}", *flags]) == 0
    seconds = time.monotonic() - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return Trained([entry["loss"] for entry in history(folder) if "loss" in entry], peak, seconds)


def free(device: str) -> None:
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def compare(found: Trained, plain: Trained, precision: str, record: Any) -> None:
    """The losses of one are those of the other, in what rounding leaves of them; what they took is recorded."""
    for name, each in (("", found), (" plain", plain)):
        record(f"GiB{name}", round(each.peak, 2))
        record(f"s{name}", round(each.seconds, 1))
    assert len(found.losses) == COMMON["max_steps"]
    assert plain.losses[-1] < plain.losses[0]
    assert found.losses == pytest.approx(plain.losses, rel=CLOSE[precision])


def test_checkpointing_saves_memory(device: str, train: Train, record_property: Any) -> None:
    found, plain = train(CHECKPOINTING), train()
    compare(found, plain, "fp32", record_property)
    assert device == "cpu" or found.peak < 0.8 * plain.peak


def test_offload_saves_more(device: str, train: Train, needs_card: NeedsCard, record_property: Any) -> None:
    here = train(CHECKPOINTING)
    needs_card("offload")
    found = train(CHECKPOINTING, OFFLOAD)
    compare(found, here, "fp32", record_property)
    assert found.peak < here.peak


def test_eager_attention_is_sdpa(train: Train, record_property: Any) -> None:
    compare(train("--attn_implementation=eager"), train(), "fp32", record_property)


def test_a_fused_optimizer_is_the_plain_one(train: Train, record_property: Any) -> None:
    compare(train(), train("--optim=adamw_torch"), "fp32", record_property)


def test_lora_in_bf16_is_lora(device: str, train: Train, record_property: Any) -> None:
    pytest.importorskip("peft")
    found = train("--bf16", *LORA)
    compare(found, train(*LORA), "bf16", record_property)
    assert device == "cpu" or found.peak < train("--bf16").peak


def test_sdpa_trains_by_its_flash_kernel_in_bf16(train: Train, record_property: Any) -> None:
    plain = train("--bf16")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # another one raises
        found = train("--bf16", "--attn_implementation=sdpa")
    compare(found, plain, "bf16", record_property)


def test_flex_attention_is_sdpa_in_bf16(train: Train, needs_card: NeedsCard, record_property: Any) -> None:
    plain = train("--bf16")
    needs_card("flex attention's backward pass")
    compare(train("--bf16", "--attn_implementation=flex_attention"), plain, "bf16", record_property)


def test_flash_attention_is_sdpa_in_bf16(train: Train, needs_card: NeedsCard, record_property: Any) -> None:
    plain = train("--bf16")
    needs_card("flash attention")
    if not is_flash_attn_2_available():
        pytest.skip("flash_attn is not installed, and without it transformers loads a kernel from the Hub")
    compare(train("--bf16", "--attn_implementation=flash_attention_2"), plain, "bf16", record_property)


def test_liger_saves_memory_in_bf16(
    train: Train, needs_card: NeedsCard, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    if not is_liger_kernel_available():
        pytest.skip("liger-kernel is not installed")
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # it replaces them for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    from transformers.integrations.liger import apply_liger_kernel

    tiny = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    apply_liger_kernel(LlamaForCausalLM(tiny), None)
    plain = train("--bf16")
    needs_card("Liger's kernels")
    found = train("--bf16", "--use_liger_kernel")
    compare(found, plain, "bf16", record_property)
    assert found.peak < plain.peak
