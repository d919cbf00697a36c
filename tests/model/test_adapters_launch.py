"""Adapters on two processes, under DDP and DeepSpeed's real engine: the same numbers, exact resumes, no base saved."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from safetensors.torch import load_file

from tests.support.launching import DDP, ROOT
from tests.support.parity import history
from tests.support.two_processes import finished, losses

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed"),
]
LORA: dict[str, Any] = {
    "lora_r": 4,
    "lora_dropout": 0.1,
    "activation_checkpointing": True,
    "load_best_model_at_end": True,
}
LORA |= {"save_steps": 6, "max_steps": 18, "logging_steps": 1, "ddp_find_unused_parameters": False}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_zero_has_ddps_numbers_and_each_resumes_to_the_bit(tmp_path: Path) -> None:
    expected: Path | None = None
    for config in (DDP, *(ROOT / "launch_configs" / f"{name}.yaml" for name in ("zero2", "zero3"))):
        whole = finished(config, tmp_path / config.stem, **LORA)
        expected = expected or whole
        assert torch.allclose(losses(whole), losses(expected), rtol=1e-6, atol=0), config.stem
        names = {path.name for path in (whole / "checkpoint-12").iterdir()}
        assert "adapter_model.safetensors" in names
        assert "model.safetensors" not in names
        if config.stem == "zero2":
            with zipfile.ZipFile(whole / "checkpoint-12" / "global_step12" / "mp_rank_00_model_states.pt") as shard:
                names_in_it = shard.read("mp_rank_00_model_states/data.pkl")
            assert b"lora_A.default.weight" in names_in_it
            assert b"c_attn.base_layer.weight" not in names_in_it
        if config == DDP:  # its resume is that of one process
            continue
        shutil.copytree(whole / "checkpoint-12", tmp_path / f"{config.stem}-again" / "run" / "checkpoint-12")
        again = finished(config, tmp_path / f"{config.stem}-again", resume_from_checkpoint="true", **LORA)
        assert history(again) == history(whole), config.stem
        for folder in ("checkpoint-18", "."):
            a, b = adapter(again / folder), adapter(whole / folder)
            assert a.keys() == b.keys() == adapter(expected).keys()
            assert all(torch.equal(a[name], b[name]) for name in a), (config.stem, folder)
