"""A checkpoint is read without a second copy of the optimizer, and nothing of it is held once it is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.checkpoint.layout import read
from harness.distributed.optimizer_shards import optimizer_file
from harness.distributed.replicated import Replicated
from harness.errors import ConfigError
from harness.files import load_safely
from harness.model.flags import OptimConfig
from harness.model.optim import build_optimizer
from harness.training.state import TRAINER_STATE_FILE

MAPS = Path("/proc/self/maps")


def optimizer_of(device: str, name: str = "adamw_torch") -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.LayerNorm(30)).to(device)
    return model, build_optimizer(model, OptimConfig(optim=name))


def stepped(name: str = "adamw_torch") -> torch.optim.Optimizer:
    model, optimizer = optimizer_of("cpu", name)
    model(torch.randn(8, 40)).square().sum().backward()
    optimizer.step()
    return optimizer


def written(folder: Path, name: str = "adamw_torch", *, is_cut: bool = False, **how: Any) -> torch.optim.Optimizer:
    """What a checkpoint holds of the optimizer: the Trainer's file, or FSDP2's of one rank."""
    optimizer = stepped(name)
    (folder / TRAINER_STATE_FILE).write_text('{"global_step": 1}', encoding="utf-8")
    torch.save(optimizer.state_dict(), folder / (optimizer_file(0) if is_cut else "optimizer.pt"), **how)
    return optimizer


def loaded(folder: Path, device: str, name: str = "adamw_torch") -> torch.optim.Optimizer:
    model, optimizer = optimizer_of(device, name)
    # Of two ranks: what a single process reads goes through the CPU as well.
    files = read(folder, ranks=(0, 2)).files
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1)
    Replicated(accelerator).load_optimizer(model, optimizer, folder, files)
    return optimizer


def is_mapped(folder: Path) -> bool:
    return str(folder) in MAPS.read_text(encoding="utf-8")


needs_maps = pytest.mark.skipif(not MAPS.is_file(), reason="only Linux shows what a process maps")


# The device "meta" stands for an accelerator: tensors that should be on it are, without memory.
@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "from shards"])
@pytest.mark.parametrize("was", ["adamw_torch", "adamw_torch_fused"])
def test_the_moments_go_to_the_device_and_the_steps_of_plain_adamw_stay_on_the_host(
    was: str, is_cut: bool, tmp_path: Path
) -> None:
    written(tmp_path, was, is_cut=is_cut)
    states = loaded(tmp_path, "meta").state.values()
    assert len(states) == 4
    assert {state["exp_avg"].device.type for state in states} == {"meta"}
    assert {(state["step"].device.type, state["step"].item()) for state in states} == {("cpu", 1.0)}
    fused = loaded(tmp_path, "meta", "adamw_torch_fused").state.values()
    assert {state[name].device.type for state in fused for name in state} == {"meta"}


@needs_maps
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "from shards"])
def test_no_file_stays_mapped_and_a_deleted_one_takes_nothing_along(device: str, is_cut: bool, tmp_path: Path) -> None:
    saved = written(tmp_path, is_cut=is_cut)
    files = read(tmp_path, ranks=(0, 2)).files
    assert is_mapped(tmp_path) == (not is_cut)
    del files
    optimizer = loaded(tmp_path, device)
    assert not is_mapped(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"0" * 10)
        path.unlink()
    for a, b in zip(saved.state.values(), optimizer.state.values(), strict=True):
        names = ["step"] if device == "meta" else list(a)
        assert all(torch.equal(a[name], b[name]) for name in names)


def test_a_file_of_torchs_older_format_is_read_too(tmp_path: Path) -> None:
    saved = written(tmp_path, _use_new_zipfile_serialization=False)
    optimizer = loaded(tmp_path, "cpu")
    for a, b in zip(saved.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_file_system_that_maps_nothing_is_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to mmap 100 bytes from file: No such device (19)")

    torch.save({"a": torch.arange(3)}, tmp_path / "file.pt")
    monkeypatch.setattr(torch.UntypedStorage, "from_file", unable)
    assert load_safely(tmp_path / "file.pt", "cpu", [], mmap=True)["a"].tolist() == [0, 1, 2]


def test_a_cut_file_is_refused_mapped_or_not(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(300)}, tmp_path / "file.pt")
    whole = (tmp_path / "file.pt").read_bytes()
    (tmp_path / "file.pt").write_bytes(whole[: len(whole) // 2])
    for mmap in (False, True):
        with pytest.raises(ConfigError, match=r"file.pt can't be loaded safely"):
            load_safely(tmp_path / "file.pt", "cpu", [], mmap=mmap)
