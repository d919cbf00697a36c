"""Copies of a state in host memory: equal, apart from the original, in memory that is used again."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from harness.checkpoint.host_copies import Arena, HostCopies, plan


def as_file(state: object) -> bytes:
    file = BytesIO()
    torch.save(state, file)
    return file.getvalue()


def optimizer_after_steps() -> torch.optim.Optimizer:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 5)).sum().backward()
        optimizer.step()
    return optimizer


def test_a_copy_is_written_as_its_original_would_be() -> None:
    tied = torch.randn(6, 4)
    state = {
        "optimizer": optimizer_after_steps().state_dict(),
        "tied": [tied, tied.view(-1)],
        "part": tied[1:3, 2],
        "transposed": tied.T,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.empty(0),
        "plain": (1, "a", None, {2: 0.5}),
    }
    assert as_file(HostCopies().copy(state)) == as_file(state)


def test_a_copy_keeps_its_values_when_the_original_changes() -> None:
    original = {"a": torch.zeros(3), "rows": [1, 2]}
    copied = HostCopies().copy(original)
    original["a"].fill_(9)
    original["rows"].append(3)
    assert copied["a"].tolist() == [0, 0, 0]
    assert copied["rows"] == [1, 2]


def test_tensors_that_share_memory_are_copied_once_and_share_it() -> None:
    tied = torch.randn(8)
    copies = HostCopies()
    copied = copies.copy({"embedding": tied, "head": tied.view(2, 4)})
    assert copies.num_bytes == 32
    copied["embedding"][5] = 7.0
    assert copied["head"][1, 1] == 7.0


def test_the_memory_is_used_again_and_follows_a_change_of_size() -> None:
    copies = HostCopies()
    first = copies.copy([torch.zeros(10), torch.zeros(4)])
    second = copies.copy([torch.ones(10), torch.ones(4)])
    assert [a.data_ptr() for a in first] == [a.data_ptr() for a in second]
    assert copies.copy([torch.full((20,), 2.0), torch.ones(4)])[0].tolist() == [2.0] * 20
    assert copies.num_bytes == 96


def test_dicts_keep_their_type_and_their_attributes() -> None:
    weights = torch.nn.Linear(2, 2).state_dict()
    copied = HostCopies().copy(weights)
    assert type(copied) is OrderedDict
    assert copied._metadata == weights._metadata
    assert list(copied) == list(weights)


def test_buffers_of_an_earlier_tensor_are_not_taken_for_those_of_another() -> None:
    copies = HostCopies()
    for value in range(20):  # freed tensors give their address to the next
        assert copies.copy({"a": torch.full((1000,), float(value))})["a"].unique().tolist() == [value]


class Host:
    """
    Memory as on a machine with a device, in place of `torch.empty`: so much of it can be pinned, so much be had at all.

    What is called pinned here is ordinary memory.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, pinned: int, ordinary: int = 1 << 40) -> None:
        self.pinned, self.ordinary, self.asked = pinned, ordinary, list[tuple[int, bool]]()
        self.empty = torch.empty
        monkeypatch.setattr(torch, "empty", self)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=self.ordinary))

    def __call__(self, *size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if options.get("dtype") is not torch.uint8 or size == (0,):
            return self.empty(*size, **options)
        (count,) = size
        self.asked.append((count, pin_memory))
        if count > (self.pinned if pin_memory else self.ordinary):
            raise RuntimeError(
                "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA" if pin_memory else "no memory"
            )
        if pin_memory:
            self.pinned -= count
        return self.empty(count, **options)


def gpt2_sizes() -> list[int]:
    """Bytes of weights and moments of GPT-2 in float32."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    return [4 * parameter.numel() for parameter in model.parameters() for _ in range(3)]


MIXED = [5_000_000, 3, 700, 5_000_000, 123_456, 16, 1_048_576, 2_000_001]


@pytest.mark.parametrize("sizes", [[], [1], [32, 32], MIXED, [9] * 50, [3 << 20, 1]])
@pytest.mark.parametrize("rounded", [False, True])
def test_blocks_lie_apart_inside_their_chunks(*, rounded: bool, sizes: list[int]) -> None:
    chunks, places = plan(sizes, rounded=rounded)
    assert len(places) == len(sizes)
    for i, chunk in enumerate(chunks):
        spans = sorted((start, start + size) for (at, start), size in zip(places, sizes, strict=True) if at == i)
        assert spans
        assert all(start % 16 == 0 for start, _ in spans)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert spans[-1][1] <= chunk
    if rounded:
        assert all(chunk == 1 << (chunk.bit_length() - 1) for chunk in chunks)
    else:
        assert len(chunks) <= 1


def test_pinned_memory_is_hardly_more_than_what_is_copied() -> None:
    sizes = gpt2_sizes()
    each_rounded = sum(1 << (size - 1).bit_length() for size in sizes)
    assert each_rounded / sum(sizes) > 1.6
    chunks, _ = plan(sizes, rounded=True)
    assert sum(chunks) / sum(sizes) < 1.01
    assert len(chunks) < 10


def test_pinned_chunks_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    host, arena = Host(monkeypatch, pinned=1 << 30), Arena(pinned=True)
    first = arena.blocks(MIXED)
    assert arena.num_bytes == sum(count for count, _ in host.asked)
    assert all(pinned for _, pinned in host.asked)
    asked = len(host.asked)
    for sizes in (MIXED, MIXED[::-1], [5_000_000, 4]):
        again = arena.blocks(sizes)
        assert [block.numel() for block in again] == sizes
    assert len(host.asked) == asked
    assert again[0].data_ptr() in {block.data_ptr() for block in first}


def test_what_cannot_be_pinned_is_ordinary_memory_which_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host, arena = Host(monkeypatch, pinned=9 << 20), Arena(pinned=True)
    for sizes in (MIXED, MIXED, [*MIXED, 30 << 20]):
        for i, block in enumerate(arena.blocks(sizes)):
            block.fill_(i)
        assert [int(block[0]) for block in arena.blocks(sizes)] == list(range(len(sizes)))
    assert {pinned for _, pinned in host.asked} == {False, True}
    (record,) = caplog.records
    assert "MiB of host memory can't be pinned (CUDA error: out of memory): " in record.getMessage()


def test_memory_that_is_not_there_is_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    host, arena = Host(monkeypatch, pinned=0, ordinary=1 << 20), Arena(pinned=True)
    with pytest.raises(MemoryError, match="out of memory"):
        arena.blocks(MIXED)
    assert all(pinned for _, pinned in host.asked)
    assert len(arena.blocks([100, 200])) == 2


def test_a_copy_without_memory_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, state = HostCopies(), [torch.zeros(10), torch.zeros(4)]
    copies.copy(state)
    with monkeypatch.context() as patched:
        Host(patched, pinned=0, ordinary=64)
        with pytest.raises(MemoryError, match="no memory"):
            copies.copy([torch.zeros(100)])
    assert copies.num_bytes == 0
    assert copies.copy(state)[1].tolist() == [0] * 4
