"""What a save takes from the device while the training goes on, and what a resume puts back there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.checkpoint.flags import CheckpointConfig
from harness.checkpoint.host_copies import Arena, HostCopies
from harness.checkpoint.layout import read
from harness.checkpoint.writer import Checkpoints, Content
from harness.distributed.replicated import Replicated
from harness.model.flags import OptimConfig
from harness.model.optim import build_optimizer
from harness.training import rng

NeedsCard = Callable[[str], None]


def busy(device: str) -> torch.Tensor:
    """Return the result of work that the device has still to do."""
    size = 8192 if device == "cuda" else 64
    value = torch.ones(size, size, device=device)
    for _ in range(20):
        value = (value @ value) / size
    return value


def states(device: str, value: float) -> dict[str, Any]:
    million = 1 << 20 if device == "cuda" else 1 << 10
    sizes = [*(7 * million + i for i in range(12)), million, 5]
    return {str(i): torch.full((size,), value, device=device) for i, size in enumerate(sizes)}


def is_all(tensor: torch.Tensor, value: float) -> bool:
    return tensor.device.type == "cpu" and bool((tensor == value).all())


def test_a_change_right_after_the_copy_does_not_reach_it(device: str) -> None:
    copies, state = HostCopies(), states(device, 1.0)
    for value in (1.0, 2.0, 3.0):
        for tensor in state.values():
            tensor.fill_(value)
        late = busy(device)
        state["late"] = late[0] * value
        copied = copies.copy(state)
        for tensor in (*state.values(), late):
            tensor.fill_(-1)
        assert list(copied) == list(state)
        assert all(is_all(tensor, value) for tensor in copied.values())


def test_the_memory_of_the_copies_is_pinned_and_is_what_is_told(
    device: str, needs_card: NeedsCard, record_property: Callable[[str, object], None]
) -> None:
    copies, state = HostCopies(), states(device, 1.0)
    copied = copies.copy(state)
    needed = sum(tensor.nbytes for tensor in state.values())
    assert needed <= copies.num_bytes < 1.1 * needed + 64
    needs_card("pinned memory")
    assert all(tensor.is_pinned() for tensor in copied.values())
    record_property("pinned / copied", round(copies.num_bytes / needed, 3))
    if not hasattr(torch.cuda, "host_memory_stats"):  # torch 2.6
        return
    before = torch.cuda.host_memory_stats()["active_bytes.current"]
    other = HostCopies()
    other.copy({name: tensor[:-1].clone() for name, tensor in state.items()})
    assert torch.cuda.host_memory_stats()["active_bytes.current"] - before == other.num_bytes


def test_memory_that_cannot_be_pinned_ends_no_training(device: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MemoryError):
        Arena(pinned=True).blocks([1 << 50])
    assert caplog.records == []
    assert HostCopies().copy({"a": torch.ones(3, device=device)})["a"].tolist() == [1.0] * 3


def test_a_file_has_the_values_of_the_save(device: str, tmp_path: Path) -> None:
    def write(folder: Path, weights: Any) -> None:
        save_file(dict(weights), folder / "model.safetensors")

    checkpoints = Checkpoints(
        tmp_path,
        CheckpointConfig(),
        ranks=(0, 1),
        agree=lambda error: None if error is None else str(error),
        gather=lambda value: [value],
        meet=lambda _: None,
    )
    state = states(device, 0.0)
    for step in (1, 2):
        for tensor in state.values():
            tensor.fill_(step)
        late = busy(device)[0].mul_(step)
        content = Content(
            step=step, weights=state, write_model=write, files={"optimizer.pt": {"late": late, "state": state}}
        )
        checkpoints.save(content)
        for tensor in (*state.values(), late):
            tensor.fill_(-1)
        checkpoints.settle()
        folder = checkpoints.path_of(step)
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        for found in (load_file(folder / "model.safetensors"), saved["state"], {"late": saved["late"]}):
            assert all(is_all(tensor, step) for tensor in found.values())


def trained(device: str, name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).to(device)
    optimizer = build_optimizer(model, OptimConfig(optim=name))
    scaler = torch.amp.GradScaler(device, init_scale=2.0)
    step(model, optimizer, scaler)
    return model, optimizer, scaler


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    optimizer.zero_grad()
    loss = sum(parameter.square().sum() for parameter in model.parameters())
    if scaler is None:
        loss.backward()
        optimizer.step()
        return
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("was", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("now", ["adamw_torch", "adamw_torch_fused"])
def test_a_resumed_optimizer_is_this_runs_and_steps_without_a_host_sync(
    was: str, now: str, device: str, needs_card: NeedsCard, tmp_path: Path
) -> None:
    saved_model, saved, saved_scaler = trained(device, was)
    torch.save(saved.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}', encoding="utf-8")
    model, optimizer, scaler = trained(device, now)
    model.load_state_dict(saved_model.state_dict())
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1)
    Replicated(accelerator).load_optimizer(model, optimizer, tmp_path, read(tmp_path, ranks=(0, 2)).files)
    is_fused = now == "adamw_torch_fused"
    for state in optimizer.state.values():
        assert state["exp_avg"].device.type == device
        assert state["step"].device.type == (device if is_fused else "cpu")
    step(model, optimizer, scaler)
    step(saved_model, saved, saved_scaler)
    for a, b in zip(model.parameters(), saved_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    step(model, optimizer, None)
    needs_card("set_sync_debug_mode")
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, optimizer, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_devices_generator_goes_on_where_it_was_saved(world_size: int, device: str) -> None:
    here = torch.device(device)
    rng.seed_everything(3, full_determinism=False)
    torch.rand(5, device=device)
    theirs, own = rng.capture(here, world_size=world_size), rng.capture_own(here)
    expected = torch.rand(5, device=device)
    for state in ({**theirs, "own": own}, theirs):
        rng.seed_everything(4, full_determinism=False)
        rng.restore(state, here)
        assert torch.equal(torch.rand(5, device=device), expected)
