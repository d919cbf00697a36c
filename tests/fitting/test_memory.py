"""What memory there is, what a block has taken, and what counts as a shortage."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from harness.errors import MemoryShortError, is_memory_short, meaning_of
from harness.fitting.memory import HostPeak, _left, free_on_host, trained_bytes

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
MIB = 2**20


def _hold(size: int) -> None:
    # Fresh pages: an allocator may give what the process has held all along.
    with mmap.mmap(-1, size) as held:
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1


@needs_linux
def test_the_peak_is_that_of_the_block_alone() -> None:
    _hold(64 * MIB)
    with HostPeak() as peak:
        _hold(32 * MIB)
    assert peak.grown is not None
    assert 24 * MIB < peak.grown < 48 * MIB


def test_a_control_groups_limit_counts_without_its_file_cache(tmp_path: Path) -> None:
    limit, used, stat = tmp_path / "max", tmp_path / "current", tmp_path / "stat"
    stat.write_text("anon 5\ninactive_file 300\n", encoding="ascii")
    used.write_text("600\n", encoding="ascii")
    limit.write_text("1000\n", encoding="ascii")
    assert _left((limit, used, stat)) == 700
    limit.write_text("max\n", encoding="ascii")
    assert _left((limit, used, stat)) is None
    assert _left((tmp_path / "none", used, stat)) is None
    assert free_on_host() > 0


def test_shortages_of_memory_are_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    found = meaning_of(refused.value)
    assert is_memory_short(refused.value)
    assert isinstance(found, MemoryShortError)
    assert "Out of memory: use a smaller --per_device_train_batch_size" in str(found)
    assert is_memory_short(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_memory_short(MemoryError())
    assert not is_memory_short(RuntimeError("size mismatch"))
    assert not is_memory_short(KeyError("DefaultCPUAllocator: can't allocate memory"))


def test_only_what_is_trained_has_gradients() -> None:
    model = torch.nn.Linear(3, 5)
    model.bias.requires_grad_(False)
    assert trained_bytes(model) == 60
