"""Who may read what a training writes: whom the umask lets."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.files import follow_umask
from harness.tasks import quickstart
from tests.support.parity import TRAINING, run_harness

SAVES = {**TRAINING, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
KINDS: dict[int, dict[str, Any]] = {
    0o022: {"report_to": "wandb", "wandb_mode": "offline", "wandb_log_model": "checkpoint", "run_name": "modes"},
    0o077: {"lora_r": 2, "lora_target_modules": ["c_attn", "c_fc"], "model_name_or_path": "none"},
    0o002: {},
}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def unlike(folder: Path, mask: int) -> dict[str, str]:
    """What does not have the mode of a new file or folder; programs aside, and W&B's read-only copies."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        if not path.is_symlink() and (mode := stat.S_IMODE(path.stat().st_mode)) != expected:
            found[str(path.relative_to(folder))] = f"{mode:o}"
    return found


@pytest.mark.parametrize("mask", KINDS, ids=oct)
def test_files_follow_the_umask(mask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    with umask(mask):
        run_harness(tmp_path / "out", {**SAVES, **KINDS[mask]})
        if mask == 0o002:
            assert main(["export", str(tmp_path / "out" / "checkpoint-4"), str(tmp_path / "exported")]) == 0
            assert unlike(tmp_path / "exported", mask) == {}
    assert list((tmp_path / "out" / "checkpoint-4").glob("*.safetensors"))
    assert unlike(tmp_path / "out", mask) == {}


def test_the_data_of_quickstart_is_there_for_all(tmp_path: Path) -> None:
    with umask(0o022):
        folder = quickstart._prepared(tmp_path / "cache")
    assert unlike(folder, 0o022) == {}


def test_only_files_are_changed_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir(mode=0o700)
    for name in ("a", "below/b"):
        (tmp_path / name).touch(mode=0o600)
    with umask(0o027):
        follow_umask(tmp_path)
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o640, "below": 0o700, "below/b": 0o640}
