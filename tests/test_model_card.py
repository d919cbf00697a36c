"""The model card says what Trainer.create_model_card says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer

from harness.flags import parse
from harness.results import write_model_card
from harness.training.state import TrainState
from tests.support.parity import CASES, TASK, TRAINING, as_flags, without_ours


def card(folder: Path, **arguments: Any) -> str:
    flags = as_flags({"task": TASK, "output_dir": folder, "report_to": "none", **arguments})
    PartialState(cpu=True)
    write_model_card(folder, parse([*flags, "--use_cpu"]), TrainState(), badge=None)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", [*CASES, "fp16"])
def test_hyperparameters_are_those_of_the_trainers_card(name: str, tmp_path: Path) -> None:
    arguments = {**TRAINING, "num_train_epochs": 2.0, "warmup_steps": 0.0, **{**CASES, "fp16": {"fp16": True}}[name]}
    arguments["warmup_steps"] = float(arguments["warmup_steps"])
    given = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **without_ours(arguments))
    expected = extract_hyperparameters_from_trainer(SimpleNamespace(args=given))
    expected["optimizer"] = expected["optimizer"].replace(str(given.optim), given.optim.value)
    expected["optimizer"] = expected["optimizer"].replace("and the args are:\n", "with optimizer_args=")
    lines = card(tmp_path, **arguments).partition("were used during training:\n")[2].partition("\n\n")[0].splitlines()
    if name == "bf16":  # the Trainer's is silent about it
        lines.remove("- mixed_precision_training: bf16")
    assert lines == [f"- {key}: {value}" for key, value in expected.items()]


def test_a_base_model_on_the_hub_is_linked_and_a_folder_is_not(tmp_path: Path) -> None:
    assert "[a/b](https://huggingface.co/a/b)" in card(tmp_path, model_name_or_path="a/b")
    assert "trained from scratch" in card(tmp_path, model_name_or_path=tmp_path)


def test_a_card_that_was_edited_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    assert card(tmp_path) == "mine"


def test_a_resumed_history_keeps_each_value_in_its_column(tmp_path: Path) -> None:
    state = TrainState()
    losses = [{"loss": 2.0, "epoch": 1.0, "step": 10}, {"loss": 1.0, "epoch": 2.0, "step": 20}]
    first = {"eval_loss": 0.75, "eval_accuracy": 0.25, "epoch": 1.0, "step": 10}
    second = {"eval_loss": 0.5, "eval_accuracy": 0.125, "epoch": 2.0, "step": 20}
    # As trainer_state.json has it, and as the attempt after it goes on.
    state.log_history = [losses[0], dict(sorted(first.items())), losses[1], second]
    state.log_history.append({"train_runtime": 1.0, "train_loss": 1.5, "epoch": 2.0, "step": 20})
    PartialState(cpu=True)
    flags = as_flags({"task": TASK, "output_dir": tmp_path, "report_to": "none"})
    write_model_card(tmp_path, parse([*flags, "--use_cpu"]), state, badge=None)
    lines = [line for line in (tmp_path / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]
    assert cells == [
        ["Training Loss", "Epoch", "Step", "Validation Loss", "Accuracy"],
        ["2.0", "1.0", "10", "0.75", "0.25"],
        ["1.0", "2.0", "20", "0.5", "0.125"],
    ]
