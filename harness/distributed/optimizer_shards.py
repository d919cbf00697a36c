"""The optimizer's shards in an FSDP2 checkpoint: each rank writes one, any number of ranks can read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch.distributed.tensor import DTensor, Shard

from harness.distributed.sharding import is_cut, rows_of
from harness.errors import ConfigError
from harness.files import load_safely

OPTIMIZER_FILES = "optimizer_rank_*.pt"


def optimizer_file(process_index: int) -> str:
    """Return the name of the file that holds a rank's part of the optimizer's state."""
    return OPTIMIZER_FILES.replace("*", str(process_index))


def optimizer_shard(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """
    Local: return the optimizer's state dict, with this rank's rows in place of sharded tensors.

    Each of these is {"rows": tensor, "start": index of the first row, "shape": of the whole tensor}. Raises ConfigError
    for an optimizer whose state is sharded otherwise.
    """
    state = optimizer.state_dict()
    shards = {
        index: {name: _shard(value) for name, value in values.items()} for index, values in state["state"].items()
    }
    return {**state, "state": shards}


def _shard(value: Any) -> Any:
    if not is_cut(value):
        return value
    if tuple(value.placements) != (Shard(0),):
        raise ConfigError(f"This optimizer shards its state as {value.placements}; use another --optim with FSDP.")
    return {"rows": value.to_local(), "start": rows_of(value)[0], "shape": list(value.shape)}


def has_optimizer_shards(folder: Path) -> bool:
    """Whether a checkpoint was saved under FSDP2."""
    return (folder / optimizer_file(0)).is_file()


def read_optimizer(folder: Path, *, ranks: tuple[int, int], is_sharded: bool) -> list[dict[str, Any]]:
    """
    Local: read the shards: only this rank's if the model is sharded among as many ranks again, else those of all.

    Tensors are memory-mapped, not read. Raises ConfigError for a file that holds anything but plain values and tensors.
    """
    count = len(list(folder.glob(OPTIMIZER_FILES)))
    wanted = [ranks[0]] if is_sharded and count == ranks[1] else range(count)
    return [load_safely(folder / optimizer_file(rank), "cpu", [], mmap=True) for rank in wanted]


def load_optimizer(optimizer: torch.optim.Optimizer, parts: Sequence[Mapping[str, Any]]) -> None:
    """
    Local: load a state dict, whole or in parts of several ranks, with each parameter's state sharded as it is now.

    Raises ValueError or KeyError if it belongs to another optimizer.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for index, values in parts[0]["state"].items():
        if index >= len(parameters):
            raise ValueError("it has more parameters")
        state[index] = {
            name: _placed([part["state"][index][name] for part in parts], parameters[index]) for name in values
        }
    optimizer.load_state_dict({**parts[0], "state": state})


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """
    Local: load a state dict whose tensors may be memory-mapped; none of them is kept.

    A tensor that is wanted on the device goes there from the file, one after the other. Raises ValueError or KeyError
    if it belongs to another optimizer.
    """
    optimizer.load_state_dict(dict(state))
    for parameter, values in optimizer.state.items():
        optimizer.state[parameter] = recursively_apply(_unmapped, values)


def _unmapped(tensor: torch.Tensor) -> torch.Tensor:
    # A mapped file that is deleted, as old checkpoints are, would keep its place on the disk until the training ends.
    return tensor.clone() if type(tensor) is torch.Tensor and tensor.device.type == "cpu" else tensor


def _placed(saved: Sequence[Any], parameter: torch.Tensor) -> Any:
    """Return a value of the optimizer's state as this rank holds it, from the parts of ranks or from the whole."""
    first = saved[0]
    if isinstance(first, Mapping) and "rows" in first:
        parts, shape = [(part["start"], part["rows"]) for part in saved], torch.Size(first["shape"])
    elif isinstance(first, torch.Tensor) and first.dim():
        parts, shape = [(0, first)], first.shape
        if is_cut(parameter) and shape != parameter.shape:
            raise ValueError(f"a state of the shape {list(shape)} is not cut like a parameter")
    else:
        return first.clone() if isinstance(first, torch.Tensor) else first  # the mapped file may be deleted
    if not is_cut(parameter):
        return _rows(parts, 0, shape[0]).to(parameter.device)  # now, or all would be in host memory at once
    local = _rows(parts, *rows_of(parameter, shape[0])).to(parameter.to_local().device)
    stride = torch.empty(shape, device="meta").stride()
    placement = (parameter.device_mesh, parameter.placements)
    return DTensor.from_local(local, *placement, run_check=False, shape=shape, stride=stride)


def _rows(parts: Sequence[tuple[int, torch.Tensor]], start: int, stop: int) -> torch.Tensor:
    """
    Return rows `start` to `stop` of a tensor given in parts, in new memory.

    Raises ValueError if some are missing.
    """
    found = torch.cat([rows[max(start - first, 0) : max(stop - first, 0)] for first, rows in parts])
    if len(found) != stop - start:
        raise ValueError(f"rows {start} to {stop} are not in it")
    return found
