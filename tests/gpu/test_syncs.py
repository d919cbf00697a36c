"""
Where the training waits for the device: once in a report, once when gradients are watched, else only in libraries.

On the CPU the calls that would wait are counted; on a card torch tells of each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.train import main
from tests.gpu.conftest import NeedsCard
from tests.support.inputs import (
    label_flags,
    labelled,
    save_bert_tokenizer,
    save_gpt_tokenizer,
    text_flags,
    write_rows,
    write_text,
)
from tests.support.measuring.syncs import Event, syncs
from tests.support.parity import as_flags, reset

STEPS, EVERY, ACCUMULATION = 6, 2, 2
SHORT = {
    "max_steps": STEPS,
    "logging_steps": EVERY,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": ACCUMULATION,
    "report_to": "none",
    "save_strategy": "no",
    "do_eval": False,
}
REPORT = "harness/distributed/transfer.py: gather_numbers"
MEAN = "harness/training/metrics.py: drain"
WATCH = "harness/tracking/media/histograms.py: _fetched"
LEARNS = ("harness/training/loss.py", "learn")
MASKS = "transformers/masking_utils.py"
Train = Callable[..., list[Event]]


@pytest.fixture
def train(device: str, tmp_path: Path) -> Train:
    """Trains a GPT-2 or a BERT with a command; returns its host syncs."""

    def trained(model: str = "gpt2", **arguments: Any) -> list[Event]:
        if model == "gpt2":
            flags = text_flags(save_gpt_tokenizer(tmp_path / "gpt2"), write_text(tmp_path / "text.txt", 400))
        else:
            rows = write_rows(tmp_path / "rows.csv", labelled(10))
            flags = label_flags(save_bert_tokenizer(tmp_path / "bert"), rows)
        reset()
        cpu = ["--use_cpu"] if device == "cpu" else []
        with syncs(device) as found:
            code = main([*flags, *as_flags({"output_dir": tmp_path / "run", **SHORT, **arguments}), *cpu])
        assert code == 0
        return found

    return trained


def places(found: list[Event], *functions: str) -> list[str]:
    """In functions of the loop; without the mean of the ranks' losses, which is computed in host memory everywhere."""
    return [event.place for event in found if event.place != MEAN and any(map(event.within, functions))]


def of_steps(found: list[Event]) -> list[str]:
    """Drawing the micro-batches, and the step; without what a new run learns of its model before the first."""
    return places([event for event in found if LEARNS not in event.frames], "steps_left", "train_step")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bf16": True, "max_grad_norm": 0.0},
        {"optim": "adamw_torch", "include_num_input_tokens_seen": "non_padding"},
        {"lr_scheduler_type": "cosine", "activation_checkpointing": True},
        {"torch_compile": True},
    ],
    ids=str,
)
def test_a_step_waits_for_nothing_and_a_report_waits_once(device: str, train: Train, arguments: dict[str, Any]) -> None:
    """With eager attention, whose masks of transformers' need no look at the values."""
    if "torch_compile" in arguments and device == "cpu":  # where it would take longest, and shows nothing more
        arguments = {"torch_compile_backend": "eager"}
    found = train(attn_implementation="eager", **arguments)
    assert of_steps(found) == []
    assert places(found, "report") == [REPORT] * (STEPS // EVERY)


@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_with_sdpa_only_transformers_looks_at_the_mask(
    train: Train, model: str, record_property: Callable[[str, object], None]
) -> None:
    found = of_steps(train(model, attn_implementation="sdpa"))
    assert {place.partition(":")[0] for place in found} <= {MASKS}
    record_property("transformers' host syncs in a forward", len(found) / STEPS / ACCUMULATION)
    assert len(found) <= STEPS * ACCUMULATION


def test_the_loss_scaler_of_fp16_adds_none_with_a_fused_optimizer(
    train: Train, tmp_path: Path, needs_card: NeedsCard, record_property: Callable[[str, object], None]
) -> None:
    needs_card("fp16's scaler")
    half = {"attn_implementation": "eager", "fp16": True}
    found = train(**half, optim="adamw_torch_fused")
    assert of_steps(found) == []
    assert places(found, "report") == [REPORT] * (STEPS // EVERY)
    plain = of_steps(train(**half, optim="adamw_torch", output_dir=tmp_path / "plain"))
    record_property("host syncs of a step with fp16's scaler and an optimizer that is not fused", len(plain) / STEPS)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_after_a_resume_a_step_waits_for_nothing_either(train: Train, optim: str) -> None:
    saves = {"attn_implementation": "eager", "optim": optim, "save_strategy": "steps", "save_steps": EVERY + 1}
    train(**saves, max_steps=EVERY + 1)
    found = train(**saves, resume_from_checkpoint="true")
    assert of_steps(found) == []
    assert not [event for event in found if LEARNS in event.frames], "what was learned is in the checkpoint"
    assert places(found, "report") == [REPORT] * 2


def test_watching_waits_once_in_an_observation_and_a_row_of_wandb_never(train: Train, needs_card: NeedsCard) -> None:
    rows = {"max_steps": 200, "logging_steps": 100, "gradient_accumulation_steps": 1}  # watch draws every 100th step
    watches = {"report_to": "wandb", "wandb_mode": "offline", "wandb_watch": "all"}
    found = train(attn_implementation="eager", **watches, **rows)
    assert places(found, "report") == [REPORT] * 2
    needs_card("watching without a wait: the host counts in its own memory,")
    assert of_steps(found) == [WATCH] * 2
