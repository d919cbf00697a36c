"""How a card is shared, switched and given back."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin

from harness.distributed.backend import StepSize
from harness.distributed.precision import set_tf32, tf32_kept
from harness.distributed.replicated import Replicated
from harness.train import main
from tests.gpu.conftest import NeedsCard
from tests.support.launching import DDP, SCRIPT, flags, launcher, run, torchrun


def compiling(device: str, mode: str) -> Accelerator:
    """An Accelerator that compiles; on the CPU without a compiler."""
    plugin = TorchDynamoPlugin(backend="inductor" if device == "cuda" else "eager", mode=mode)
    return Accelerator(cpu=device == "cpu", dynamo_plugin=plugin)


def test_gradients_add_up_over_replays_of_a_cuda_graph(device: str) -> None:
    accelerator = compiling(device, "reduce-overhead")
    set_tf32(False, by_default=True, device=accelerator.device)
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    plain.to(accelerator.device)
    copied = copy.deepcopy(plain)
    size = StepSize(batch_size=8, accumulation=3, max_grad_norm=0.0)
    model, _, stepper = Replicated(accelerator).prepare(copied, torch.optim.SGD(copied.parameters()), size)
    for _ in range(5):  # what warms up, what is recorded, what is replayed
        batches = torch.randn(3, 8, 64, device=accelerator.device)
        losses = torch.zeros((), device=accelerator.device)
        for i, batch in enumerate(batches):
            with stepper.micro_batch(is_last=i == 2):
                loss = model(batch).square().mean()
                stepper.backward(loss)
            losses += loss.detach()
        expected = sum(plain(batch).square().mean() for batch in batches)
        gradients = torch.autograd.grad(expected, list(plain.parameters()))
        torch.testing.assert_close(losses, expected.detach())
        for parameter, gradient in zip(copied.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        stepper.zero_grad()


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("mode", [None, "max-autotune"])
def test_products_use_tf32_as_asked(
    device: str, needs_card: NeedsCard, record_property: object, mode: str | None, wanted: bool
) -> None:
    accelerator = compiling(device, mode or "default")  # without mixed precision this alone turns TF32 on
    left, right = torch.randn(2, 256, 256, dtype=torch.float64)
    with tf32_kept():
        set_tf32(wanted if device == "cuda" else None, by_default=True, device=accelerator.device)
        needs_card("TF32")
        product = torch.matmul if mode is None else torch.compile(torch.matmul, mode=mode)
        found = product(left.float().to(device), right.float().to(device)).double().cpu()
    error = ((found - left @ right).norm() / (left @ right).norm()).item()
    record_property("relative error", f"{error:.1e}")  # type: ignore[operator]
    assert (error > 1e-5) == wanted


def test_two_processes_on_one_card_are_refused_but_with_gloo(tmp_path: Path, device: str) -> None:
    arguments = {"max_steps": 3, "logging_steps": 1, "expect_num_processes": 2}
    command = [*launcher(DDP), SCRIPT, *flags(tmp_path / "out", arguments)]
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    if device == "cpu":
        command.append("--use_cpu")
    else:
        ended = run(command, **visible)
        assert ended.code != 0
        assert ended.err.count("harness train: The launcher started 2 processes on this machine") == 1
        assert not (tmp_path / "out").exists()
    ended = run([*command, "--ddp_backend=gloo"], **visible)
    assert ended.code == 0, ended.err[-3000:]
    assert ended.out.count("step 1/3") == 1


CLOSED = """
import sys
import torch
from harness.train import main

code = main(sys.argv[1:])
print(f"ended with {code}, in a process group: {torch.distributed.is_initialized()}", flush=True)
"""


@pytest.mark.parametrize(("task", "code"), [("stopping_task", 85), ("faulty_task", 1)])
def test_a_process_group_of_nccl_is_closed_however_the_run_ends(
    tmp_path: Path, device: str, task: str, code: int
) -> None:
    script = tmp_path / "script.py"
    script.write_text(CLOSED, encoding="utf-8")
    how = {"after": 20, "sent": str(tmp_path / "sent")} if task == "stopping_task" else {"raises_at": 20}
    arguments = {"max_steps": 30, "save_steps": 30, "task": f"tests.support.tasks.{task}:build", "task_args": how}
    command = [*torchrun(1), str(script), *flags(tmp_path / "out", arguments)]
    ended = run([*command, "--use_cpu"] if device == "cpu" else command)
    if code == 85:
        assert "ended with 85, in a process group: False" in ended.out, ended.err[-3000:]
    else:
        assert "Traceback" in ended.err
    assert "destroy_process_group() was not called" not in ended.err


def test_full_determinism_is_refused_after_cublas_was_used(
    device: str, needs_card: NeedsCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    needs_card("cuBLAS")
    torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
    assert main([*flags(tmp_path / "out", {"max_steps": 1}), "--full_determinism"]) == 2
    assert "set CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts" in capsys.readouterr().err


SEES = """
import sys
from harness.train import main

code = main(sys.argv[1:])
import torch
print("sees a card:", torch.cuda.is_available())
sys.exit(code)
"""


def test_a_start_on_the_cpu_leaves_the_card_alone(tmp_path: Path) -> None:
    argv = [*flags(tmp_path / "out", {"max_steps": 1}), "--use_cpu"]
    ended = run([sys.executable, "-c", SEES, *argv], forked=False)
    assert ended.code == 0, ended.err[-3000:]
    assert "sees a card: False" in ended.out
