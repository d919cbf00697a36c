"""Run the same training by transformers.Trainer and by harness, and compare to the last bit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments, set_seed

from harness.tasks import TaskConfig, resolve
from harness.train import main

TASK = "tests.support.tasks.parity_task:build"
# Values of the clock and of the machine, which no two runs share.
TIMING = re.compile(r"runtime|per_second|model_preparation_time|^train/(throughput|memory)/")
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "seed": 42,
    "save_strategy": "no",
}


def as_flags(arguments: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in arguments.items():
        flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_trainer(
    folder: Path,
    arguments: Mapping[str, Any],
    *,
    task: str = TASK,
    task_config: Mapping[str, Any] | None = None,
    early_stopping: Mapping[str, Any] | None = None,
    resume: str | None = None,
) -> Trainer:
    """The reference: seed, build, and let the Trainer do it; as Transformers' example scripts."""
    reset()
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **arguments
    )
    set_seed(arguments.seed)
    built = resolve(task)(TaskConfig(task=task, **(task_config or {})))

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        metrics = built.metrics()
        metrics.update(torch.tensor(np.asarray(prediction.predictions)), torch.tensor(prediction.label_ids))
        return metrics.compute()

    def reduce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return built.metrics().predictions(logits, labels)

    trainer = Trainer(
        model=built.model,
        args=arguments,
        train_dataset=built.train_dataset,
        eval_dataset=built.eval_dataset,
        data_collator=built.data_collator,
        processing_class=built.processing_class,
        compute_metrics=compute_metrics if built.metrics else None,
        preprocess_logits_for_metrics=reduce if built.metrics else None,
        compute_loss_func=built.compute_loss_func,
        callbacks=[EarlyStoppingCallback(**early_stopping)] if early_stopping else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    return trainer


def run_harness(
    folder: Path,
    arguments: Mapping[str, Any],
    *,
    task: str = TASK,
    task_config: Mapping[str, Any] | None = None,
    extra: tuple[str, ...] = (),
) -> None:
    """The same by our command, in this process."""
    reset()
    flags = as_flags({"task": task, **(task_config or {}), "output_dir": folder, "report_to": "none", **arguments})
    assert main([*flags, "--use_cpu", *extra]) == 0


def history(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [{k: v for k, v in entry.items() if not TIMING.search(k)} for entry in state["log_history"]]


def assert_equal_runs(reference: Path, ours: Path) -> None:
    """Same events, keys, order and values; same weights: to the bit."""
    expected, found = history(reference), history(ours)
    for i, (a, b) in enumerate(zip(expected, found, strict=False)):
        assert list(b.items()) == list(a.items()), f"event {i} of {len(expected)}"
    assert len(found) == len(expected)
    assert_equal_weights(reference, ours)


def assert_equal_weights(reference: Path, ours: Path) -> None:
    names = ("model.safetensors", "adapter_model.safetensors")
    files = [[folder / name for name in names if (folder / name).is_file()] for folder in (reference, ours)]
    (a,), (b,) = ([load_file(file) for file in each] for each in files)
    assert a.keys() == b.keys()
    different = {name: (a[name] - b[name]).abs().max().item() for name in a if not torch.equal(a[name], b[name])}
    assert not different


def keys_of_history(folder: Path) -> list[list[str]]:
    """All keys of the events in order, wall-clock ones included."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [list(entry) for entry in state["log_history"]]
