"""How long a run is, and what is due at which step: the Trainer's arithmetic."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import DefaultFlowCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from harness.errors import ConfigError
from harness.training.flags import PlanConfig
from harness.training.plan import Due, Plan, resolve_plan
from harness.training.state import TrainState


class Numbers(Dataset):  # type: ignore[type-arg]
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(range(1000))


def trainers(folder: Path, **arguments: Any) -> Trainer:
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **arguments)
    return Trainer(model=torch.nn.Linear(1, 1), args=args)


def plan(config: PlanConfig, samples: int | None = 100, batch: int = 4, accumulation: int = 1, world: int = 1) -> Plan:
    batches = None if samples is None else -(-samples // (batch * world))
    per_step = batch * accumulation * world
    return resolve_plan(
        config, num_batches=batches, num_samples=samples, accumulation=accumulation, samples_per_step=per_step
    )


LENGTHS: list[dict[str, Any]] = [
    {"num_train_epochs": 3.0},
    {"num_train_epochs": 1.5},
    {"num_train_epochs": 0.1},
    {"num_train_epochs": 2.999},
    {"max_steps": 1},
    {"max_steps": 7},
    {"max_steps": 100},
    {"max_steps": 7, "num_train_epochs": 0.0},
]


def test_length_is_the_trainers_over_a_grid(tmp_path: Path) -> None:
    trainer = trainers(tmp_path)
    for samples, batch, accumulation, length in itertools.product((1, 5, 16, 17, 100), (1, 4, 7), (1, 2, 5), LENGTHS):
        trainer.args.max_steps = length.get("max_steps", -1)
        trainer.args.num_train_epochs = length.get("num_train_epochs", 3.0)
        trainer.args.gradient_accumulation_steps = accumulation
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = batch
        epochs, updates, _, num_samples, per_step, batches, max_steps = trainer.set_initial_training_values(
            trainer.args, DataLoader(Numbers(samples), batch_size=batch)
        )
        found = plan(PlanConfig(**length), samples, batch, accumulation)
        assert per_step == batch * accumulation
        assert (found.num_train_epochs, found.updates_per_epoch, found.max_steps) == (epochs, updates, max_steps)
        assert (found.num_samples, found.batches_per_epoch) == (num_samples, batches)


def test_length_of_a_stream_is_the_trainers(tmp_path: Path) -> None:
    trainer = trainers(tmp_path, max_steps=9, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    epochs, updates, _, num_samples, _, batches, max_steps = trainer.set_initial_training_values(
        trainer.args, DataLoader(Stream(), batch_size=4)
    )
    found = plan(PlanConfig(max_steps=9), samples=None, accumulation=2)
    assert found.num_train_epochs == epochs == sys.maxsize
    assert (found.updates_per_epoch, found.max_steps, found.num_samples) == (updates, max_steps, num_samples)
    assert found.batches_per_epoch == batches


def test_several_ranks_share_an_epoch() -> None:
    found = plan(PlanConfig(), samples=100, batch=4, accumulation=3, world=2)
    assert (found.batches_per_epoch, found.updates_per_epoch, found.max_steps) == (13, 5, 15)


CADENCES: list[dict[str, Any]] = [
    {},
    {"logging_steps": 3, "save_steps": 4, "eval_strategy": "steps"},
    {"logging_steps": 0.1, "save_steps": 0.25, "eval_strategy": "steps", "eval_steps": 0.3},
    {"logging_steps": 5, "logging_first_step": True, "eval_strategy": "steps", "eval_steps": 4, "eval_delay": 9},
    {"logging_strategy": "epoch", "save_strategy": "epoch", "eval_strategy": "epoch", "eval_delay": 2},
    {"logging_strategy": "no", "logging_first_step": True, "save_strategy": "no"},
    {"logging_strategy": "epoch", "logging_first_step": True},
]


@pytest.mark.parametrize("cadence", CADENCES, ids=str)
def test_what_is_due_is_what_the_trainers_callback_says(cadence: dict[str, Any], tmp_path: Path) -> None:
    config = PlanConfig(**cadence, num_train_epochs=3)
    found = plan(config, samples=28)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", num_train_epochs=3, **cadence)
    theirs = TrainerState(max_steps=found.max_steps)
    theirs.compute_steps(args, found.max_steps)
    assert (found.logging_steps, found.save_steps, found.eval_steps) == (
        theirs.logging_steps,
        theirs.save_steps,
        theirs.eval_steps,
    )
    callback, ours = DefaultFlowCallback(), TrainState()
    events = 0
    for step in range(1, found.max_steps + 1):
        ours.global_step = theirs.global_step = step
        ours.epoch = theirs.epoch = step / found.updates_per_epoch
        control = callback.on_step_end(args, theirs, TrainerControl())
        pairs = [(found.at_step(ours), control)]
        if step % found.updates_per_epoch == 0:
            pairs.append((found.at_epoch_end(ours), callback.on_epoch_end(args, theirs, TrainerControl())))
        for due, says in pairs:
            expected = Due(log=says.should_log, evaluate=says.should_evaluate, save=says.should_save)
            assert due == expected, f"step {step}"
            events += due.log + due.evaluate + due.save
    assert events > 0


def test_resolved_numbers_are_shown_in_the_state() -> None:
    state = TrainState()
    plan(PlanConfig(logging_steps=0.1, save_steps=0.5), samples=40).show_in(state)
    assert (state.max_steps, state.num_train_epochs, state.logging_steps, state.save_steps) == (30, 3, 3, 15)


def test_data_that_fills_no_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not fill one batch"):
        plan(PlanConfig(), samples=0)


def test_a_stream_needs_max_steps() -> None:
    with pytest.raises(ConfigError, match="give --max_steps"):
        plan(PlanConfig(), samples=None)


@pytest.mark.parametrize(
    "values",
    [
        {"num_train_epochs": 0},
        {"num_train_epochs": -1},
        {"num_train_epochs": math.nan},
        {"num_train_epochs": math.inf},
        {"max_steps": 0},
        {"max_steps": -2},
        {"logging_steps": 0},
        {"logging_steps": -3},
        {"logging_steps": math.nan},
        {"logging_steps": 1.5},
        {"save_steps": 0},
        {"eval_strategy": "steps", "eval_steps": 0},
        {"eval_delay": -1},
        {"logging_strategy": "steps!"},
        {"save_strategy": "epochs"},
        {"save_strategy": "best"},
    ],
    ids=str,
)
def test_impossible_plans_are_refused_by_the_flags_name(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"--{[*values][-1]}="):
        PlanConfig(**values)


def test_steps_of_what_never_happens_are_not_looked_at() -> None:
    PlanConfig(save_strategy="no", save_steps=0, logging_strategy="no", logging_steps=0, eval_steps=0)
