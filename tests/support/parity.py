"""Run the same training by transformers.Trainer and by harness, and compare to the last bit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments, set_seed

from harness.config import release
from harness.tasks import TaskConfig, resolve
from harness.train import main

# Below it the Trainer is another one: label smoothing counts per micro-batch, a Llama's count is not shifted, and the
# batches of an evaluation are grouped by length otherwise.
LOWEST_TRAINER = (5, 16)
needs_trainer = pytest.mark.skipif(
    release("transformers") < LOWEST_TRAINER,
    reason=f"the Trainer of transformers below {'.'.join(map(str, LOWEST_TRAINER))} is another one",
)
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
# The Trainer's eval_loss is a mean of means over batches, whatever they hold; by default ours is of all tokens.
AS_TRAINER = {"loss_scaling": "trainer"}
EVERY_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch", **AS_TRAINER}
EVERY_4 = {"eval_strategy": "steps", "eval_steps": 4, **AS_TRAINER}
# Settings whose numbers must be the Trainer's.
CHECKPOINTING = "activation_checkpointing" if release("transformers") >= (5, 23) else "gradient_checkpointing"
CASES: dict[str, dict[str, Any]] = {
    "dropout, padding, masked labels": {},
    "accumulation 2, ragged": {"gradient_accumulation_steps": 2},
    "accumulation 3, ragged": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 7},
    "accumulation 4, ragged": {"gradient_accumulation_steps": 4, "logging_steps": 2},
    "warmup steps, cosine": {"warmup_steps": 5, "lr_scheduler_type": "cosine"},
    "warmup share, polynomial": {"warmup_steps": 0.2, "lr_scheduler_type": "polynomial"},
    "constant with warmup": {"warmup_steps": 3, "lr_scheduler_type": "constant_with_warmup"},
    "inverse square root": {"warmup_steps": 3, "lr_scheduler_type": "inverse_sqrt"},
    "cosine with restarts": {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}, **EVERY_4},
    "weight decay": {"weight_decay": 0.1},
    "label smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2, **EVERY_4},
    "AdamW, not fused": {"optim": "adamw_torch"},
    "Adafactor": {"optim": "adafactor"},
    "SGD": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
    "group by length": {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2, **EVERY_EPOCH},
    "sequential": {"train_sampling_strategy": "sequential", "dataloader_drop_last": True},
    "data seed": {"data_seed": 7},
    "max_steps inside an epoch": {
        "max_steps": 19,
        **EVERY_4,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 8,
    },
    "fraction of an epoch": {"num_train_epochs": 1.5, "logging_steps": 0.1, **EVERY_EPOCH},
    "logging per epoch, first step": {"logging_strategy": "epoch", "logging_first_step": True, **EVERY_EPOCH},
    "evaluation at the start, delayed later": {
        "eval_on_start": True,
        **EVERY_4,
        "eval_delay": 9,
        "prediction_loss_only": True,
        "metric_for_best_model": "loss",
    },
    "best model by accuracy": {
        **EVERY_EPOCH,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "learning_rate": 5e-2,
        "save_total_limit": 1,
    },
    "saved when best": {
        **EVERY_4,
        "save_strategy": "best",
        "metric_for_best_model": "eval_loss",
        "learning_rate": 2e-2,
    },
    "gradient checkpointing": {
        CHECKPOINTING: True,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
    },
    "bf16": {"bf16": True, "gradient_accumulation_steps": 2, **EVERY_4},
    "no clipping": {"max_grad_norm": 0.0},
    "workers": {"dataloader_num_workers": 2, **EVERY_EPOCH},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "tokens seen": {"include_num_input_tokens_seen": "non_padding", "logging_steps": 4, **EVERY_EPOCH},
    "not averaged across devices": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
}


def as_flags(arguments: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in arguments.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def without_ours(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What TrainingArguments takes."""
    return {name: value for name, value in arguments.items() if name not in AS_TRAINER}


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
    device: str = "cpu",
) -> Trainer:
    """The reference: seed, build, and let the Trainer do it; as Transformers' example scripts."""
    reset()
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=device == "cpu",
        report_to="none",
        disable_tqdm=True,
        **without_ours(arguments),
    )
    set_seed(arguments.seed)
    built = resolve(task)(TaskConfig(task=task, **(task_config or {})))

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        metrics = built.metrics()
        metrics.update(torch.tensor(np.asarray(prediction.predictions)), torch.tensor(np.asarray(prediction.label_ids)))
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
    device: str = "cpu",
) -> None:
    """The same by our command, in this process."""
    reset()
    flags = as_flags({"task": task, **(task_config or {}), "output_dir": folder, "report_to": "none", **arguments})
    assert main([*flags, f"--use_cpu={device == 'cpu'}", *extra]) == 0


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
