"""Steps that a loss scaler skips, and models that nothing has wrapped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import TorchDynamoPlugin
from transformers import Trainer, TrainingArguments, set_seed

from harness.checkpoint.lock import Lock
from harness.distributed.accelerator import build_accelerator
from harness.distributed.backend import StepSize
from harness.distributed.replicated import AcceleratedStepper, Replicated, uses_cudagraphs
from harness.errors import ConfigError
from harness.execute import run_on
from harness.flags import parse
from harness.tasks import TaskConfig, resolve
from tests.support.parity import TASK, TRAINING, as_flags, assert_equal_runs, history, reset

# A schedule that shows each step that it makes, and saves between two overflows.
ARGUMENTS = {**TRAINING, "lr_scheduler_type": "linear", "max_steps": 20, "save_strategy": "steps", "save_steps": 9}


def use_fp16(accelerator: Accelerator) -> None:
    """What accelerate does for fp16 on a GPU and leaves out on the CPU, with a scale that overflows every few steps."""
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)


def train(folder: Path, **more: Any) -> None:
    reset()
    arguments = {"task": TASK, "output_dir": folder, "report_to": "wandb", **ARGUMENTS, **more}
    config = parse([*as_flags(arguments), "--use_cpu"])
    accelerator = build_accelerator(config.topology, activation_checkpointing=False)
    use_fp16(accelerator)
    with Lock() as lock:
        run_on(accelerator, config, lock)
    accelerator.end_training()


def skipped(folder: Path) -> list[int]:
    """How many steps each report has counted."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["train/num_skipped_steps"] for row in rows if "train/loss" in row]


@pytest.fixture(scope="module", params=["adamw_torch", "adamw_torch_fused"])
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipping") / str(request.param)
    train(folder, optim=request.param)
    return folder


def test_skipped_steps_are_counted_and_the_schedule_is_the_trainers(ours: Path, tmp_path: Path) -> None:
    counts = skipped(ours)
    assert len(counts) == 20
    assert counts[0] == 1
    assert counts[0] < counts[8] < counts[-1] < 15, "some are skipped, at the beginning and again later"
    rates = [event["learning_rate"] for event in history(ours) if "loss" in event]
    stood = [i for i in range(1, 20) if rates[i] == rates[i - 1]]
    was_skipped = [i for i in range(1, 20) if counts[i - 1] > (counts[i - 2] if i > 1 else 0)]
    # accelerate does not see what a fused optimizer skips, and so the Trainer's schedule goes on.
    assert stood == ([] if ours.name == "adamw_torch_fused" else was_skipped)
    assert not [key for event in history(ours) for key in event if "skipped" in key]
    reset()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, optim=ours.name, **ARGUMENTS
    )
    set_seed(arguments.seed)
    task = resolve(TASK)(TaskConfig(task=TASK))
    trainer = Trainer(
        model=task.model,
        args=arguments,
        train_dataset=task.train_dataset,
        data_collator=task.data_collator,
        compute_loss_func=task.compute_loss_func,
    )
    use_fp16(trainer.accelerator)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    assert_equal_runs(tmp_path, ours)


def test_a_resume_keeps_the_count_and_the_state_of_the_scaler(ours: Path, tmp_path: Path) -> None:
    saved = torch.load(ours / "checkpoint-9" / "scaler.pt", weights_only=True)
    assert saved["scale"] < 2.0**22
    shutil.copytree(ours / "checkpoint-9", tmp_path / "run" / "checkpoint-9")
    train(tmp_path / "run", optim=ours.name, resume_from_checkpoint="true")
    assert_equal_runs(ours, tmp_path / "run")
    assert skipped(tmp_path / "run")[-11:] == skipped(ours)[-11:]


def test_a_resume_steps_by_the_optimizer_of_this_run(ours: Path, tmp_path: Path) -> None:
    other = {"adamw_torch": "adamw_torch_fused", "adamw_torch_fused": "adamw_torch"}[ours.name]
    shutil.copytree(ours / "checkpoint-9", tmp_path / "run" / "checkpoint-9")
    train(tmp_path / "run", optim=other, resume_from_checkpoint="true", allow_changed_arguments=True)
    groups = torch.load(tmp_path / "run" / "checkpoint-18" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [bool(group["fused"]) for group in groups] == [other == "adamw_torch_fused"] * 2
    # An optimizer that skips by itself hides the step from the schedule: the others must still be those of this run.
    rates = [event["learning_rate"] for event in history(tmp_path / "run")[9:] if "loss" in event]
    stood = sum(rates[i] == rates[i - 1] for i in range(1, len(rates)))
    assert (stood == 0) == (other == "adamw_torch_fused")


def test_no_count_is_shown_where_no_loss_is_scaled(tmp_path: Path) -> None:
    reset()
    config = parse(
        [
            *as_flags({"task": TASK, "output_dir": tmp_path, "report_to": "wandb", **ARGUMENTS}),
            "--use_cpu",
            "--bf16",
        ]
    )
    accelerator = build_accelerator(config.topology, activation_checkpointing=False)
    with Lock() as lock:
        run_on(accelerator, config, lock)
    assert "num_skipped_steps" not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def prepare(model: Any, kind: DistributedType) -> None:
    """Prepare under an accelerate that wraps nothing."""
    accelerator: Any = SimpleNamespace(
        distributed_type=kind, device=torch.device("cpu"), prepare=lambda *objects: objects
    )
    optimizer = torch.optim.SGD(model.parameters())
    Replicated(accelerator).prepare(model, optimizer, StepSize(batch_size=1, accumulation=1, max_grad_norm=1.0))


@pytest.mark.usefixtures("group")
def test_a_model_that_is_not_wrapped_as_the_launch_says_is_refused() -> None:
    bare = torch.nn.Linear(2, 1)
    wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    for kind in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        prepare(wrapped, kind)
        prepare(torch.compile(wrapped, backend="eager"), kind)
        with pytest.raises(ConfigError, match=r"DistributedDataParallel, but it is a bare Linear with 2 parameters"):
            prepare(bare, kind)
        with pytest.raises(ConfigError, match="bare Linear"):
            prepare(torch.compile(bare, backend="eager"), kind)
    prepare(bare, DistributedType.NO)


class Replayed(torch.autograd.Function):
    """A product whose gradient lies in memory that the next backward pass overwrites, as a replay of a CUDA graph."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, x: torch.Tensor, memory: npt.NDArray[np.float32]) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.memory = memory
        return (weight * x).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.memory[:] = (gradients[0] * ctx.saved_tensors[0]).numpy()
        return torch.from_numpy(ctx.memory), None, None


@pytest.mark.parametrize(("copies", "added_up"), [(True, True), (False, False)])
def test_gradients_of_several_micro_batches_add_up_where_each_overwrites_the_one_before(
    copies: bool, added_up: bool
) -> None:
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(3, 1, bias=False)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters()))
    stepper = AcceleratedStepper(accelerator, model, optimizer, copies_gradients=copies)
    memory = np.zeros((1, 3), dtype=np.float32)
    for step in range(2):
        batches = torch.arange(9.0).view(3, 1, 3) + step
        for i, batch in enumerate(batches):
            with stepper.micro_batch(is_last=i == 2):
                stepper.backward(Replayed.apply(model.weight, batch, memory))
        assert (model.weight.grad is not None and torch.equal(model.weight.grad, batches.sum(0))) == added_up
        stepper.zero_grad()
        assert model.weight.grad is None


@pytest.mark.parametrize(
    ("backend", "mode", "device", "uses"),
    [
        ("inductor", "reduce-overhead", "cuda", True),
        ("inductor", "max-autotune", "cuda", True),
        ("inductor", "max-autotune", "cpu", False),
        ("inductor", "max-autotune-no-cudagraphs", "cuda", False),
        ("inductor", None, "cuda", False),
        ("cudagraphs", None, "cuda", True),
        (None, "max-autotune", "cuda", False),
    ],
)
def test_cudagraphs_are_seen(backend: str | None, mode: str | None, device: str, uses: bool) -> None:
    accelerator = Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend=backend, mode=mode))
    accelerator.state.device = torch.device(device)
    assert uses_cudagraphs(accelerator) == uses
