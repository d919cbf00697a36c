"""--auto_find_batch_size: the micro-batch that is found, and the run that is the same with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harness
from harness.errors import ConfigError, MemoryShortError
from harness.fitting.search import as_it_was, divisors, size_kept
from tests.support.fitting.limited_task import Limited, Samples, collate
from tests.support.parity import TRAINING, assert_equal_runs, reset, run_harness

TASK = "tests.support.fitting.limited_task:build"
SHORT: dict[str, Any] = {
    **TRAINING,
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "include_num_input_tokens_seen": "no",
}
FIND = {"auto_find_batch_size": True}


def test_the_largest_micro_batch_that_fits_is_found_and_the_run_is_the_one_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = {"task_args": {"limit": 7, "dropout": 0.2}}
    run_harness(tmp_path / "found", {**SHORT, **limited, **FIND}, task=TASK)
    says = "Micro-batches have 6 samples, the most that fit in memory; a device takes 2 of them in a step."
    assert says in capsys.readouterr().out
    given = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    run_harness(tmp_path / "given", {**SHORT, **limited, **given}, task=TASK)
    assert_equal_runs(tmp_path / "given", tmp_path / "found")


def found_by(model: nn.Module, *flags: str) -> nn.Module:
    reset()
    common = ["--max_steps=2", "--report_to=none", "--save_strategy=no", "--use_cpu", "--auto_find_batch_size"]
    harness.run([*common, *flags], model=model, train_dataset=Samples(), data_collator=collate)
    return model


def test_sizes_are_tried_from_the_smallest_up_until_one_fails(tmp_path: Path) -> None:
    model = Limited(limit=4)
    flags = [f"--output_dir={tmp_path}", "--per_device_train_batch_size=12"]
    found_by(model, *flags)
    # The first once more when the optimizer has its state; then a step's three micro-batches.
    assert model.sizes == [1, 1, 2, 3, 4, 6, *[4] * 6]
    assert model.failures == 1


def test_the_optimizers_state_is_in_memory_when_sizes_are_tried(tmp_path: Path) -> None:
    seen: list[int] = []
    made: list[torch.optim.AdamW] = []
    model = Limited()

    def note(*_: Any) -> None:
        if model.training:
            seen.append(len(made[0].state))

    def build_optimizer(of: nn.Module) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(of.parameters(), lr=1e-3))
        return made[0]

    model.register_forward_pre_hook(note)
    reset()
    flags = ["--max_steps=1", "--report_to=none", "--save_strategy=no", "--use_cpu", f"--output_dir={tmp_path}"]
    sizes = ["--auto_find_batch_size", "--per_device_train_batch_size=4"]
    parts: dict[str, Any] = {"model": model, "train_dataset": Samples(), "data_collator": collate}
    harness.run([*flags, *sizes], build_optimizer=build_optimizer, **parts)
    assert len(made) == 1
    # Of one sample without and with it, of 2 and of 4; then the training begins.
    assert seen == [0, 4, 4, 4, 0]


def test_a_model_that_does_not_fit_with_one_sample_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(MemoryShortError, match="not even a micro-batch of one sample fits"):
        found_by(Limited(limit=0), f"--output_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            self.passes += 1
        return {"loss": nn.functional.cross_entropy(self.layer(x), labels)}


class Contrastive(nn.Module):
    """Each sample's negatives are the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.layer(x)
        return {"loss": nn.functional.cross_entropy(hidden @ hidden.T, torch.arange(len(x)))}


@pytest.mark.parametrize(
    ("model", "flags", "says"),
    [
        (Normed, [], "layers.1 is a batch norm, so the numbers depend on the size of a micro-batch"),
        (Counting, [], "a forward pass changes passes, so the numbers depend on the size of a micro-batch"),
        (Contrastive, [], "the loss of a batch is no mean or sum over its samples"),
        (Limited, ["--loss_scaling=trainer"], "--loss_scaling=trainer: there the numbers depend on the size"),
        (Limited, ["--ddp_static_graph=true"], "--ddp_static_graph does nothing; leave it out"),
        (Limited, ["--dataloader_drop_last"], "how many samples an epoch leaves out would depend on the machine"),
        (Limited, ["--per_device_train_batch_size=1"], "--per_device_train_batch_size=1 with --gradient_accumul"),
    ],
)
def test_a_training_whose_numbers_depend_on_the_micro_batch_is_refused(
    model: type[nn.Module], flags: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        found_by(model(), f"--output_dir={tmp_path / 'out'}", *flags)
    assert says in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_stream_begins_with_the_micro_batches_that_were_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(Samples().samples)

    reset()
    model = Limited()
    flags = ["--max_steps=2", "--report_to=none", "--save_strategy=no", "--use_cpu", "--auto_find_batch_size"]
    harness.run([*flags, f"--output_dir={tmp_path}"], model=model, train_dataset=Stream(), data_collator=collate)
    assert "Micro-batches have 8 samples, as given, since a stream is not read ahead" in capsys.readouterr().out
    assert model.sizes == [8, 8]


def test_what_a_step_changes_is_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3))
    model[2].eval()
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "betas": [0.9, 0.99]}], lr=0.1)
    tensors = copy.deepcopy(model.state_dict())
    groups = copy.deepcopy([{**group, "params": None} for group in optimizer.param_groups])
    generator = torch.get_rng_state()
    with as_it_was(model, optimizer, torch.device("cpu")):
        model.train()
        model(torch.rand(4, 3)).sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["betas"][0] = 0.5
        optimizer.param_groups[0]["steps"] = 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert [{**group, "params": None} for group in optimizer.param_groups] == groups
    assert optimizer.param_groups[0]["params"] == list(model[0].parameters())
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model] == [True, True, False]


def test_micro_batches_divide_the_samples_of_a_step() -> None:
    assert divisors(1) == [1]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_processes": 2}, 4),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_processes": 1}, None),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_processes": 2}, None),
        ({"per_device_train_batch_size": "4", "gradient_accumulation_steps": 3, "num_processes": 2}, None),
        ({}, None),
        (None, None),
    ],
)
def test_micro_batches_of_a_checkpoint_are_kept_where_the_steps_are_the_same(data: Any, kept: int | None) -> None:
    assert size_kept({"data": data}, 12, 2) == kept
