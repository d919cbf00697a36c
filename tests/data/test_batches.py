"""How batches are made: what draws random numbers goes on to the bit, with workers too if batches are seeded."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from harness.data.flags import DataConfig
from harness.data.loader import TrainLoader
from harness.data.samples import Samples
from harness.training import rng
from tests.support.inputs import TINY_BERT, save_bert_tokenizer, write_text
from tests.support.launching import DDP, SCRIPT, flags, launcher, run
from tests.support.parity import TRAINING, assert_equal_runs, history, run_harness


def draws() -> list[float]:
    return [torch.rand(1).item(), float(np.random.rand()), random.random()]


def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"ids": rows["ids"], "noise": [draws() for _ in rows["ids"]]}


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "ids": torch.tensor([sample["ids"] for sample in samples]),
        "noise": torch.tensor([*itertools.chain(*(sample["noise"] for sample in samples)), *draws()]),
    }


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def loader_of(accelerator: Accelerator, **config: Any) -> TrainLoader:
    rows = datasets.Dataset.from_dict({"ids": list(range(21))}).with_transform(transform)
    options = DataConfig(per_device_train_batch_size=4, **config)
    return TrainLoader(Samples(dataset=rows, collate=collate), options, accelerator, seed=42)


def drawn(batches: Iterator[dict[str, torch.Tensor]]) -> list[Any]:
    return [(batch["ids"].tolist(), batch["noise"].tolist(), draws()) for batch in batches]


def resumed_after(accelerator: Accelerator, stop: int, **config: Any) -> tuple[list[Any], list[Any]]:
    """Two epochs, once whole and once interrupted in the second."""
    rng.seed_everything(42, full_determinism=False)
    whole = loader_of(accelerator, **config)
    expected = [drawn(whole.epoch(epoch)) for epoch in range(2)]
    rng.seed_everything(42, full_determinism=False)
    first = loader_of(accelerator, **config)
    drawn(first.epoch(0))
    first.finish_epoch()
    head = drawn(itertools.islice(first.epoch(1), stop))
    saved = (first.state_dict(), first.rng_state_dict(), rng.capture_host())
    rng.seed_everything(7, full_determinism=False)
    resumed = loader_of(accelerator, **config)
    resumed.load_state_dict(*saved)
    assert resumed.state_dict()["data_digest"] is not None
    return expected[1], head + drawn(resumed.epoch(1))


@pytest.mark.parametrize("seeded", [False, True])
def test_a_random_transform_and_collator_resume_to_the_bit(seeded: bool, accelerator: Accelerator) -> None:
    for stop in range(7):
        expected, found = resumed_after(accelerator, stop, dataloader_seed_batches=seeded)
        assert found == expected, f"stopped after {stop}"


@pytest.mark.slow
def test_with_workers_they_do_if_batches_are_seeded(accelerator: Accelerator) -> None:
    for stop in (1, 3):
        expected, found = resumed_after(accelerator, stop, dataloader_seed_batches=True, dataloader_num_workers=2)
        assert found == expected
    expected, found = resumed_after(accelerator, 3, dataloader_seed_batches=False, dataloader_num_workers=2)
    assert [batch[0] for batch in found] == [batch[0] for batch in expected]
    assert [batch[2] for batch in found] == [batch[2] for batch in expected]
    assert [batch[1] for batch in found] != [batch[1] for batch in expected]


@pytest.mark.slow
def test_seeded_batches_are_the_same_with_any_number_of_workers(accelerator: Accelerator) -> None:
    found = []
    for options in (
        {},
        {"dataloader_num_workers": 1},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    ):
        loader = loader_of(accelerator, dataloader_seed_batches=True, **options)
        found.append([[batch["noise"].tolist() for batch in loader.epoch(epoch)] for epoch in range(2)])
    assert found[0] == found[1] == found[2]


def test_seeded_batches_move_no_generator_and_differ_from_each_other(accelerator: Accelerator) -> None:
    rng.seed_everything(42, full_determinism=False)
    loader = loader_of(accelerator, dataloader_seed_batches=True)
    batches = loader.epoch(0)
    first = next(batches)
    before = draws()
    rest = list(batches)
    rng.seed_everything(42, full_determinism=False)
    torch.empty((), dtype=torch.int64).random_()  # what any DataLoader draws at its beginning
    assert draws() == before
    again = list(loader.epoch(1))
    noises = {tuple(batch["noise"].tolist()) for batch in [first, *rest, *again]}
    assert len(noises) == 12
    other = TrainLoader(
        Samples(dataset=loader.dataset, collate=collate),
        DataConfig(per_device_train_batch_size=4, dataloader_seed_batches=True),
        accelerator,
        seed=43,
    )
    assert next(other.epoch(0))["noise"].tolist() != first["noise"].tolist()


def test_peek_shows_the_first_seeded_batch(accelerator: Accelerator) -> None:
    loader = loader_of(accelerator, dataloader_seed_batches=True)
    peeked = loader.peek()["noise"].tolist()
    assert next(loader.epoch(0))["noise"].tolist() == peeked


# Whole runs

DRAWING = {**TRAINING, "save_strategy": "steps", "save_steps": 11}
TASK = "tests.support.tasks.drawing_task:build"


def masked_flags(folder: Path) -> dict[str, Any]:
    return {
        "task": "masked-lm",
        "model_type": "bert",
        "config_overrides": TINY_BERT,
        "tokenizer_name": save_bert_tokenizer(folder / "tokenizer"),
        "train_file": write_text(folder / "text.txt", 100),
        "line_by_line": True,
    }


def test_a_run_on_random_samples_and_batches_resumes_to_the_bit(tmp_path: Path) -> None:
    arguments = {**DRAWING, "task_args": {"kind": "random", "random_collator": True}}
    run_harness(tmp_path / "whole", arguments, task=TASK)
    for step in (11, 22):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        run_harness(tmp_path / f"from-{step}", {**arguments, "resume_from_checkpoint": checkpoint}, task=TASK)
        assert_equal_runs(tmp_path / "whole", tmp_path / f"from-{step}")


@pytest.mark.slow
@pytest.mark.parametrize("seeded", [True, False])
def test_masking_with_workers_resumes_to_the_bit_if_batches_are_seeded(seeded: bool, tmp_path: Path) -> None:
    masking = masked_flags(tmp_path)
    arguments = {**DRAWING, "dataloader_num_workers": 2, "dataloader_seed_batches": seeded}
    task = masking.pop("task")
    run_harness(tmp_path / "whole", arguments, task=task, task_config=masking)
    resumed = {**arguments, "resume_from_checkpoint": tmp_path / "whole" / "checkpoint-11"}
    run_harness(tmp_path / "resumed", resumed, task=task, task_config=masking)
    if seeded:
        assert_equal_runs(tmp_path / "whole", tmp_path / "resumed")
        return
    losses = [[row.get("loss") for row in history(tmp_path / name)] for name in ("whole", "resumed")]
    assert losses[0][:11] == losses[1][:11]
    assert losses[0][11:] != losses[1][11:]


@pytest.mark.slow
def test_masking_on_two_processes_with_workers_resumes_to_the_bit(tmp_path: Path) -> None:
    options = {"dataloader_num_workers": 1, "dataloader_seed_batches": True, "per_device_train_batch_size": 4}
    arguments = {**DRAWING, **options, **masked_flags(tmp_path)}
    for name, resume in (("whole", {}), ("resumed", {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-11"})):
        ended = run([*launcher(DDP), "--num_processes=2", SCRIPT, *flags(tmp_path / name, {**arguments, **resume})])
        assert ended.code == 0, ended.err[-3000:]
    assert_equal_runs(tmp_path / "whole", tmp_path / "resumed")
