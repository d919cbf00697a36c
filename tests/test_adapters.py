"""Adapters of peft: the Trainer's numbers and files, exact resume, merged models, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2LMHeadModel

from harness.adapters import merged_model
from harness.arguments import parse
from harness.config import ConfigError
from harness.train import main
from tests.support.inputs import (
    TINY_GPT,
    labelled,
    save_bert_tokenizer,
    save_gpt_tokenizer,
    text_flags,
    write_rows,
    write_text,
)
from tests.support.parity import TRAINING, assert_equal_runs, assert_equal_weights, history, run_harness, run_trainer

ADAPTED = "tests.support.parity_task:build_adapted"
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["c_attn", "c_fc"]}
LORA_FLAGS = {"lora_r": 4, "lora_alpha": 16, "lora_dropout": 0.1}
LORA_TARGETS = ("--lora_target_modules", "c_attn", "c_fc")
EVERY_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch"}
RESUMABLE = {"save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2, "num_train_epochs": 2}


def trained(folder: Path, arguments: Mapping[str, Any], peft: Mapping[str, Any] = LORA, **options: Any) -> None:
    """The reference: the Trainer on a PeftModel."""
    run_trainer(folder, {**TRAINING, **arguments}, task=ADAPTED, task_config={"task_args": {"peft": peft}}, **options)


def ours(folder: Path, arguments: Mapping[str, Any], **flags: Any) -> None:
    given = flags or {**LORA_FLAGS}
    run_harness(folder, {**TRAINING, **arguments, **given}, extra=() if flags else LORA_TARGETS)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 2, "weight_decay": 0.1},
        {**EVERY_EPOCH, "load_best_model_at_end": True, "learning_rate": 5e-2, "metric_for_best_model": "accuracy"},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "bf16": True},
    ],
    ids=["accumulation, decay", "best at the end", "reentrant checkpointing", "smoothing, NEFTune, bf16"],
)
def test_history_and_weights_are_the_trainers(arguments: dict[str, Any], tmp_path: Path) -> None:
    trained(tmp_path / "trainer", arguments)
    ours(tmp_path / "ours", arguments)
    assert_equal_runs(tmp_path / "trainer", tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
