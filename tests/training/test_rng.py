"""Random generators: a rank goes on from those of its own device, and no device is touched that does not train."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.training import rng

CPU, SEED = torch.device("cpu"), 42


class Node:
    """
    A machine with several GPUs, as one process on it sees them, in place of `torch.cuda`.

    A device's generator is known by its seed, and by the number of draws from it.
    """

    def __init__(self, num_devices: int) -> None:
        self.states = [torch.tensor([SEED, 0], dtype=torch.uint8) for _ in range(num_devices)]
        self.current = 0

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state(self) -> torch.Tensor:
        return self.states[self.current].clone()

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [state.clone() for state in self.states]

    def set_rng_state(self, state: torch.Tensor, index: int | None = None) -> None:
        self.states[self.current if index is None else index] = state.clone()

    def draw(self, times: int) -> None:
        self.states[self.current][1] += times


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The node that the process at hand is on."""
    here = SimpleNamespace(node=Node(1))
    for name in ("device_count", "get_rng_state", "get_rng_state_all", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: getattr(here.node, name)(*args))
    return here


def placed(here: SimpleNamespace, rank: int, per_node: int) -> torch.device:
    """Be a rank, which Accelerate has given the device of its number on the node."""
    here.node = Node(per_node)
    here.node.current = rank % per_node
    return torch.device("cuda", here.node.current)


def saved_by(here: SimpleNamespace, rank: int, per_node: int) -> dict[str, Any]:
    """What a checkpoint has of a rank that has drawn as often as its number says."""
    device = placed(here, rank, per_node)
    here.node.draw(rank + 1)
    return {**rng.capture(device, world_size=8), "own": rng.capture_own(device)}


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (4, 4), (2, 8), (1, 4), (8, 1)])
def test_a_rank_goes_on_from_its_own_device_on_nodes_of_any_size(
    before: int, after: int, node: SimpleNamespace
) -> None:
    for rank in range(8):
        state = saved_by(node, rank, before)
        device = placed(node, rank, after)
        rng.restore(state, device)
        drawn = [int(each[1]) for each in node.node.states]
        assert drawn == [rank + 1 if i == device.index else 0 for i in range(after)]


def test_a_trainers_states_go_by_the_devices_of_the_node(node: SimpleNamespace) -> None:
    theirs = {name: value for name, value in saved_by(node, 2, 4).items() if name != "own"}
    for count, expected in ((4, [0, 0, 3, 0]), (2, [0, 0]), (8, [0, 0, 3, 0, 0, 0, 3, 0])):
        device = placed(node, 2, count)
        rng.restore(theirs, device)
        assert [int(each[1]) for each in node.node.states] == expected


def test_one_process_keeps_the_trainers_single_state(node: SimpleNamespace) -> None:
    device = placed(node, 0, 2)
    node.node.draw(5)
    state = rng.capture(device)
    assert state["cuda"].tolist() == [SEED, 5]
    rng.restore(state, placed(node, 0, 1))
    assert node.node.states[0].tolist() == [SEED, 5]


def test_all_devices_are_put_back_for_a_model_that_is_spread_over_them(node: SimpleNamespace) -> None:
    device = placed(node, 0, 3)
    state = rng.capture(device, world_size=2)
    for node.node.current in range(3):
        node.node.draw(1 + node.node.current)
    rng.restore(state, device)
    assert [int(each[1]) for each in node.node.states] == [0, 0, 0]


def test_the_cpu_has_no_state_beside_the_hosts() -> None:
    assert rng.capture_own(CPU) == {}
    assert set(rng.capture(CPU, world_size=2)) == {"python", "numpy", "cpu"}


def test_a_gpu_that_is_not_trained_on_is_left_alone(node: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> None:
        raise AssertionError("CUDA was initialised")

    of_gpu = saved_by(node, 1, 2)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (torch.cuda, torch.cuda.random):
        monkeypatch.setattr(module, "_lazy_init", opened)
    with pytest.raises(AssertionError, match="CUDA was initialised"):
        torch.cuda.get_rng_state()
    rng.seed_everything(SEED, full_determinism=False)
    state = rng.capture(CPU, world_size=2)
    drawn = torch.rand(3)
    rng.restore({**state, "cuda": of_gpu["cuda"], "own": of_gpu["own"]}, CPU)
    assert torch.equal(torch.rand(3), drawn)
    assert not torch.cuda.is_initialized()
