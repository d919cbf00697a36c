"""
Load the optimizer's state: from the Trainer's file, or from FSDP2's shards.

Under FSDP2 each rank writes one, and any number of ranks can read them. A state is compared with the parameters before
it is loaded: the kernels of a fused step believe the sizes, and write past a tensor that is too short.
"""

from __future__ import annotations

import math
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
# What a step of these needs of each parameter that it has a state of. Of other optimizers that is not known.
ADAM = ("step", "exp_avg", "exp_avg_sq")
NEEDED = {
    **dict.fromkeys(("Adam", "AdamW", "RAdam"), ADAM),
    "NAdam": (*ADAM, "mu_product"),
    "Adamax": ("step", "exp_avg", "exp_inf"),
    "Adadelta": ("step", "square_avg", "acc_delta"),
    "Adagrad": ("step", "sum"),
    "ASGD": ("step", "eta", "mu", "ax"),
    "RMSprop": ("step", "square_avg"),
    "Rprop": ("step", "prev", "step_size"),
    "Adafactor": ("step",),
    "Muon": ("momentum_buffer",),
    "SGD": (),
}
# What they need if a value of the group is set.
NEEDED_IF = {
    ("Adam", "amsgrad"): "max_exp_avg_sq",
    ("AdamW", "amsgrad"): "max_exp_avg_sq",
    ("RMSprop", "momentum"): "momentum_buffer",
    ("RMSprop", "centered"): "grad_avg",
    ("Adafactor", "beta1"): "exp_avg",
}
# Adafactor's second moments, by the package that it is of: of a matrix, and of another parameter.
SECOND_MOMENTS = {
    "torch": (("row_var", "col_var"), ("variance",)),
    "transformers": (("exp_avg_sq_row", "exp_avg_sq_col"), ("exp_avg_sq",)),
}
SINGLE = ("step", "eta", "mu", "mu_product", "RMS")  # a number each, of a parameter as a whole
NAMES = {name for names in NEEDED.values() for name in names} | {*NEEDED_IF.values(), "momentum_buffer", "RMS"}
NAMES |= {name for both in SECOND_MOMENTS.values() for names in both for name in names}


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
    return [read_shard(folder / optimizer_file(rank)) for rank in wanted]


def read_shard(file: Path) -> dict[str, Any]:
    """Local: read the shard of a rank, memory-mapped. Raises ConfigError for a file that holds anything else."""
    shard: dict[str, Any] = load_safely(file, "cpu", [], mmap=True)
    check_optimizer_file(file.name, shard)
    return shard


def load_optimizer(optimizer: torch.optim.Optimizer, parts: Sequence[Mapping[str, Any]]) -> None:
    """
    Local: load a state dict, whole or in parts of several ranks, with each parameter's state sharded as it is now.

    Raises ValueError if it belongs to another optimizer, or does not fit its parameters.
    """
    check_state(optimizer, parts)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for index, values in parts[0]["state"].items():
        state[index] = {
            name: _placed([part["state"][index][name] for part in parts], parameters[index]) for name in values
        }
    optimizer.load_state_dict({**parts[0], "state": state})


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """
    Local: load a state dict whose tensors may be memory-mapped; none of them is kept.

    A tensor that is wanted on the device goes there from the file, one after the other. Raises ValueError if it belongs
    to another optimizer, or does not fit its parameters.
    """
    check_state(optimizer, [state])
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


def check_optimizer_file(name: str, content: Any) -> None:
    """Raise ConfigError unless a file holds what an optimizer saves, whichever it is of."""
    state, groups = (content.get(key) if isinstance(content, dict) else None for key in ("state", "param_groups"))
    if not isinstance(state, dict) or not all(
        isinstance(values, dict) for key, values in state.items() if _is_index(key)
    ):
        raise ConfigError(f"{name} holds no state of an optimizer")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ConfigError(f"{name} holds no groups of parameters")


def _is_index(key: Any) -> bool:
    """Whether it may be the index of a parameter; other keys are of the optimizer as a whole."""
    return type(key) is int


def check_state(optimizer: torch.optim.Optimizer, parts: Sequence[Mapping[str, Any]]) -> None:
    """
    Local: raise ValueError unless a state, whole or in parts of several ranks, fits the optimizer.

    The groups have to be the optimizer's, by number, size and types. What torch's optimizers and Transformers'
    Adafactor need of each parameter has to be there, in the shape that follows from the parameter's. Of another
    optimizer only this is known: what has the shape of a matrix has that of every parameter in the group.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's has it inside
    kind = _known(optimizer)
    for part in parts:
        _check_groups(optimizer.param_groups, part["param_groups"], needs_numbers=kind is not None)
    parameters = [(i, each) for i, group in enumerate(optimizer.param_groups) for each in group["params"]]
    found: dict[tuple[int, str], dict[int, tuple[torch.Size, torch.Size]]] = {}
    for index in filter(_is_index, parts[0]["state"]):
        if not 0 <= index < len(parameters):
            raise ValueError("it has more parameters")
        values = [part["state"].get(index) for part in parts]
        if any(not isinstance(each, Mapping) or set(each) != set(values[0]) for each in values):
            raise ValueError(f"the parts of parameter {index} do not belong together")
        group, parameter = parameters[index]
        wholes = {name: _whole(f"{name} of parameter {index}", [part[name] for part in values]) for name in values[0]}
        if kind is not None and wholes:
            _check_known(index, wholes, parameter, _needed(kind, parts[0]["param_groups"][group], parameter))
        for name, whole in wholes.items():
            if kind is None and isinstance(whole, torch.Tensor):
                found.setdefault((group, name), {})[index] = (whole.shape, parameter.shape)
    for (_, name), shapes in found.items():
        _check_alike(name, shapes)


def _known(optimizer: torch.optim.Optimizer) -> type | None:
    """Return which of the optimizers in NEEDED makes the steps; None for another, and for a step of somebody else's."""
    of = [each for each in (type(optimizer).step, *type(optimizer).__mro__) if _package_of(each) in SECOND_MOMENTS]
    if not of or of[0] is not type(optimizer).step:
        return None
    return next((each for each in of if isinstance(each, type) and each.__name__ in NEEDED), None)


def _package_of(each: Any) -> str:
    return str(each.__module__).partition(".")[0]


def _needed(kind: type, group: Mapping[str, Any], parameter: torch.Tensor) -> list[str]:
    """Return what a step needs of a parameter that has a state."""
    needed = [*NEEDED[kind.__name__]]
    needed += [what for (name, switch), what in NEEDED_IF.items() if name == kind.__name__ and group.get(switch)]
    if kind.__name__ == "Adafactor":
        of_matrix, of_other = SECOND_MOMENTS[_package_of(kind)]
        needed += of_matrix if parameter.dim() > 1 else of_other
    return needed


def _check_groups(own: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], *, needs_numbers: bool) -> None:
    if len(own) != len(saved):
        raise ValueError(f"it has {len(saved)} groups of parameters, and there are {len(own)}")
    count = 0
    for mine, group in zip(own, saved, strict=True):
        expected = list(range(count, count + len(mine["params"])))
        if group.get("params") != expected:
            has_more = isinstance(found := group.get("params"), list) and len(found) > len(expected)
            what = "more parameters" if has_more else "other parameters"
            raise ValueError(f"it has {what}: a group has not the {len(expected)} of this run, counted from {count}")
        count += len(expected)
        for name in mine.keys() - {"params"}:
            if name in group and (fault := why_unlike(mine[name], group[name])) is not None:
                raise ValueError(f"{name} of a group is {fault}")
            # A switch may be of a newer torch; without a number no step can be made.
            if name not in group and needs_numbers and isinstance(mine[name], float | tuple):
                raise ValueError(f"a group has no {name}")


def why_unlike(own: Any, saved: Any) -> str | None:
    """
    Return why a saved value can't take the place of one's own, as words that go on "it is ..."; None if it can.

    Values may differ, types and sizes may not: the shape of a tensor, the length of a list, the names in a mapping.
    A plain value that is None on one side may be another on the other, but a number stays one.
    """
    if own is None or saved is None:
        plain = all(each is None or isinstance(each, bool | int | float | str) for each in (own, saved))
        return None if plain and not _is_number(own) else f"a {type(saved).__name__}"
    if isinstance(own, torch.Tensor) or isinstance(saved, torch.Tensor):
        return _why_unlike_tensor(own, saved)
    if isinstance(own, Mapping) or isinstance(saved, Mapping):
        if not isinstance(own, Mapping) or not isinstance(saved, Mapping):
            return f"a {type(saved).__name__} instead of a {type(own).__name__}"
        faults = ((f"{name} that is", why_unlike(own[name], saved[name])) for name in own if name in saved)
        return next((f"a mapping with {name} {fault}" for name, fault in faults if fault is not None), None)
    if isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(own):
            return f"a {type(saved).__name__} instead of {len(own)} values"
        several = (why_unlike(a, b) for a, b in zip(own, saved, strict=True))
        return next((f"a list with {fault}" for fault in several if fault is not None), None)
    return _why_unlike_plain(own, saved)


def _why_unlike_plain(own: Any, saved: Any) -> str | None:
    if not _is_number(own) or not _is_number(saved):
        if type(own) is not type(saved):
            return f"a {type(saved).__name__} instead of a {type(own).__name__}"
        return why_unlike(vars(own), vars(saved)) if hasattr(own, "__dict__") and own is not saved else None
    return None if math.isfinite(saved) or not math.isfinite(own) else f"{saved}, not finite"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _why_unlike_tensor(own: Any, saved: Any) -> str | None:
    """As `why_unlike`; a number may stand for a tensor without dimensions: a learning rate may be either."""
    for each in (own, saved):
        if not (isinstance(each, torch.Tensor) or _is_number(each)):
            return f"a {type(saved).__name__} instead of a {type(own).__name__}"
    if isinstance(saved, torch.Tensor) and not is_ordinary(saved):
        return "no ordinary tensor"
    mine, other = (each if isinstance(each, torch.Tensor) else torch.tensor(float(each)) for each in (own, saved))
    if mine.shape != other.shape:
        return f"of the shape {list(other.shape)} instead of {list(mine.shape)}"
    return None if mine.is_floating_point() == other.is_floating_point() else f"of {other.dtype}"


def is_ordinary(value: Any) -> bool:
    """Whether it is a tensor with memory of the host: neither sparse nor quantized, and of no other class."""
    is_plain = type(value) is torch.Tensor and value.layout == torch.strided and not value.is_quantized
    return is_plain and value.device.type == "cpu"


def _whole(what: str, parts: Sequence[Any]) -> Any:
    """
    Return a state that is in parts of ranks, a tensor of rows as one of its whole shape, without memory.

    Raises ValueError for parts that make no whole.
    """
    first = parts[0]
    if isinstance(first, Mapping) and "rows" in first:
        return _whole_of_rows(what, parts)
    for value in parts:
        if isinstance(value, torch.Tensor) != isinstance(first, torch.Tensor):
            raise ValueError(f"{what} is a tensor in some parts only")
        if isinstance(value, torch.Tensor) and (not is_ordinary(value) or value.shape != first.shape):
            raise ValueError(f"{what} is no ordinary tensor")
    return first


def _whole_of_rows(what: str, parts: Sequence[Any]) -> torch.Tensor:
    shape, stop = parts[0].get("shape"), None
    if not isinstance(shape, list) or not shape or not all(_is_index(size) and size >= 0 for size in shape):
        raise ValueError(f"{what} has no shape")
    for part in parts:
        rows, start = (part.get("rows"), part.get("start")) if isinstance(part, Mapping) else (None, None)
        if type(start) is not int or part["shape"] != shape:
            raise ValueError(f"{what} has parts that do not belong together")
        if not isinstance(rows, torch.Tensor) or not is_ordinary(rows) or list(rows.shape[1:]) != shape[1:]:
            raise ValueError(f"{what} has rows of another shape than {shape[1:]}")
        if rows.dim() == 0 or start < 0:
            raise ValueError(f"{what} has no rows")
        if len(rows) == 0:
            continue  # more ranks than rows: where it would begin says nothing
        if start + len(rows) > shape[0] or stop not in (None, start):
            raise ValueError(f"{what} has rows that do not follow each other")
        stop = start + len(rows)
    return torch.empty(shape, dtype=parts[0]["rows"].dtype, device="meta")


def _check_known(index: int, values: Mapping[str, Any], parameter: torch.Tensor, needed: Sequence[str]) -> None:
    """Raise ValueError unless the state of a parameter has what is needed, each in the shape that it must have."""
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"parameter {index} has no {missing[0]}")
    for name in NAMES & values.keys():
        value, what = values[name], f"{name} of parameter {index}"
        if name in SINGLE:
            _check_single(what, value)
        elif not isinstance(value, torch.Tensor):
            if value is not None or name in needed:
                raise ValueError(f"{what} is a {type(value).__name__} instead of a tensor")
        elif list(value.shape) != (shape := _shape_of(name, list(parameter.shape))):
            raise ValueError(f"{what} has the shape {list(value.shape)} instead of {shape}")
        elif not (value.is_complex() if parameter.is_complex() else value.is_floating_point()):
            raise ValueError(f"{what} holds {value.dtype}")


def _shape_of(name: str, shape: list[int]) -> list[int]:
    """Return the shape of a state by its name and the shape of its parameter."""
    by_name = {
        "exp_avg_sq_row": shape[:-1],
        "exp_avg_sq_col": [*shape[:-2], *shape[-1:]],
        "row_var": [*shape[:-1], 1],
        "col_var": [*shape[:-2], 1, *shape[-1:]],
    }
    return by_name.get(name, shape)


def _check_single(what: str, value: Any) -> None:
    is_one = isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()
    number = value.item() if is_one and value.device.type == "cpu" else value
    if not (isinstance(number, int | float) and math.isfinite(number) and number >= 0):
        raise ValueError(f"{what} is no number of at least 0")


def _check_alike(name: str, shapes: Mapping[int, tuple[torch.Size, torch.Size]]) -> None:
    """Raise ValueError if a state has the shape of some matrices, and does not follow from another parameter's."""
    if not any(shape == own and len(own) > 1 for shape, own in shapes.values()):
        return
    for index, (shape, own) in shapes.items():
        if shape.numel() != 1 and shape != own and not set(shape) <= {*own, 1}:
            raise ValueError(f"{name} of parameter {index} has the shape {list(shape)} beside {list(own)}")
