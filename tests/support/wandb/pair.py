"""
The same trainings by transformers.Trainer with its WandbCallback, or by harness: a script for a process of its own.

`pair.py trainer|ours FOLDER JSON` runs a list of `Training`s one after the other, also under a launcher: each in
FOLDER/NAME and in the project NAME-trainer or NAME-ours, with the tokenizer in PAIR_TOKENIZER.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wandb
from transformers import AutoTokenizer, EvalPrediction, Trainer, TrainingArguments, set_seed

from harness.config import Json
from harness.tasks import Task, TaskConfig
from harness.tracking.client import separate_randomness
from harness.train import main as train
from tests.support.parity import as_flags, reset, without_ours
from tests.support.tasks import parity_task

TASK = "tests.support.wandb.pair:build"


@dataclass(frozen=True, kw_only=True)
class Training:
    """
    What both are given; `flags` are ours alone. The run name OUTPUT_DIR stands for that folder.

    With `adapter`, a configuration of peft's, both train one. With `opened`, a run is open before the training begins.
    """

    name: str
    arguments: Mapping[str, Any]
    variables: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] | None = None
    opened: Mapping[str, Any] | None = None


def build(config: TaskConfig) -> Task:
    """The parity task with a tokenizer, which belongs into every model's folder."""
    task = parity_task.build(config)
    return replace(task, processing_class=AutoTokenizer.from_pretrained(os.environ["PAIR_TOKENIZER"]))


def by_trainer(folder: Path, arguments: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> None:
    """As Transformers' example scripts do it."""
    reset()
    options = {"use_cpu": True, "report_to": "wandb", "disable_tqdm": True, **without_ours(arguments)}
    given = TrainingArguments(output_dir=str(folder), **options)
    set_seed(given.seed)
    if adapter is None:
        task = build(TaskConfig(task=TASK))
    else:
        tokenizer = AutoTokenizer.from_pretrained(os.environ["PAIR_TOKENIZER"])
        adapted = parity_task.build_adapted(TaskConfig(task=TASK, task_args=Json({"peft": adapter})))
        task = replace(adapted, processing_class=tokenizer)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        metrics = parity_task.TokenAccuracy()
        metrics.update(torch.tensor(np.asarray(prediction.predictions)), torch.tensor(prediction.label_ids))
        return metrics.compute()

    trainer = Trainer(
        model=task.model,
        args=given,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
        data_collator=task.data_collator,
        processing_class=task.processing_class,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()


def by_harness(folder: Path, arguments: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    reset()
    given = {"task": TASK, "output_dir": folder, "report_to": "wandb", **arguments, **flags}
    assert train([*as_flags(given), "--use_cpu", "--disable_tqdm"]) == 0


def main() -> None:
    torch.set_num_threads(1)
    who, folder, listed = sys.argv[1:]
    if who == "trainer":
        separate_randomness()  # else wandb moves the random state that the checkpoints hold, now and then
    is_main = os.environ.get("RANK", "0") == "0"
    for training in (Training(**each) for each in json.loads(listed)):
        variables = {"WANDB_PROJECT": f"{training.name}-{who}", **training.variables}
        os.environ.update(variables)
        wandb.teardown()  # it reads its variables once
        run = None
        if training.opened is not None and is_main:
            run = wandb.init(**{**training.opened, "project": f"{training.opened['project']}-{who}"})
        output_dir, arguments = Path(folder, training.name), dict(training.arguments)
        if arguments.get("run_name") == "OUTPUT_DIR":
            arguments["run_name"] = str(output_dir)
        if who == "trainer":
            by_trainer(output_dir, arguments, training.adapter)
        else:
            adapter = {"peft_config": dict(training.adapter)} if training.adapter is not None else {}
            by_harness(output_dir, arguments, {**training.flags, **adapter})
        if run is not None:
            assert wandb.run is run, "an open run is its owner's to finish"
            run.log({"after": 1})
        wandb.finish()
        for name in variables:
            del os.environ[name]
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def as_json(trainings: list[Training]) -> str:
    return json.dumps([asdict(training) for training in trainings])


if __name__ == "__main__":
    main()
