"""Copies of a state in host memory: equal, apart from the original, in memory that is used again."""

from __future__ import annotations

from collections import OrderedDict
from io import BytesIO

import torch

from harness.checkpoint.host_copies import HostCopies


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
