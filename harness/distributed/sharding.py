"""
Operations on sharded tensors, for code that has a tensor or a model and no backend.

FSDP2 cuts a tensor into rows, one part a rank (DTensor); ZeRO-3 partitions a parameter, which then looks empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, TypeGuard

import torch
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_cut(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether FSDP2 has cut it, so that this rank holds some of its rows."""
    return isinstance(tensor, DTensor)


def is_divided(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 has partitioned it among the ranks."""
    return hasattr(parameter, "ds_id")


def is_part(tensor: torch.Tensor) -> bool:
    """Whether this rank holds only a part of it, whether by FSDP2 or by ZeRO-3."""
    return is_cut(tensor) or is_divided(tensor)


def joined(tensor: torch.Tensor) -> torch.Tensor:
    """Collective: return the whole tensor on the device; a tensor that is not cut is returned as it is."""
    return tensor.full_tensor() if is_cut(tensor) else tensor


def gathered(parameters: Iterable[torch.Tensor], *, written_by: int | None = None) -> AbstractContextManager[Any]:
    """
    Collective: return a context in which parameters partitioned by ZeRO-3 are whole.

    What rank `written_by` writes into them is kept. Other parameters are left as they are.
    """
    divided = [parameter for parameter in parameters if is_divided(parameter)]
    if not divided:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[Any] = GatheredParameters(divided, modifier_rank=written_by)
    return context


def whole_on_first(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Collective: return copies of whole tensors in host memory on rank zero, made layer by layer, {} on other ranks.

    The names are those of a state dict: the part before the last dot is the layer.
    """
    is_first = torch.distributed.get_rank() == 0
    copies: dict[int, torch.Tensor] = {}  # by id: tied parameters are copied once
    for _, group in groupby(tensors.items(), key=lambda item: item[0].rpartition(".")[0]):
        layer = [tensor for _, tensor in group if id(tensor) not in copies]
        with gathered(layer):
            for tensor in layer:
                whole = joined(tensor.detach())
                copies[id(tensor)] = whole.to("cpu", copy=True) if is_first else torch.empty(0)
    return {name: copies[id(tensor)] for name, tensor in tensors.items()} if is_first else {}


def reshard(model: torch.nn.Module) -> None:
    """
    Local: let go of the whole weights that FSDP2 keeps between a forward and its backward.

    After an evaluation no backward follows: a rank would hold them, and who reads the model's parameters would get
    them in place of this rank's rows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fill(tensor: torch.Tensor, rows: Any) -> None:
    """
    Collective if ZeRO-3 has partitioned it, else local: fill a sharded tensor from whole `rows`.

    `rows` must support slices; as far as possible only this rank's rows are read.
    """
    if is_cut(tensor):
        start, stop = rows_of(tensor)
        tensor.to_local().copy_(rows[start:stop])
        return
    with gathered([tensor], written_by=0):
        if torch.distributed.get_rank() == 0:
            tensor.copy_(rows[:])


def rows_of(tensor: DTensor, count: int | None = None) -> tuple[int, int]:
    """Return start and stop of this rank's rows of a tensor, or of `count` rows sharded alike, as torch.chunk."""
    mesh, count = tensor.device_mesh, tensor.shape[0] if count is None else count
    a_part = -(-count // mesh.size())
    start = min(mesh.get_local_rank() * a_part, count)
    return start, min(start + a_part, count)


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[ProcessGroup, ...]]:
    """Local: return this rank's rows, all if the tensor is not cut, and the process groups that hold the other rows."""
    if not is_cut(tensor):
        return tensor, ()
    mesh = tensor.device_mesh  # a replicated dimension needs no group: each rank has all of it
    groups = (mesh.get_group(i) for i, placement in enumerate(tensor.placements) if placement.is_shard())
    return tensor.to_local(), tuple(groups)


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the shape of the whole parameter."""
    shape: torch.Size = parameter.ds_shape if is_divided(parameter) else parameter.shape  # type: ignore[attr-defined]
    return shape


def num_parameters(model: torch.nn.Module, *, exclude_embeddings: bool = False) -> int | None:
    """
    Return `model.num_parameters()`, with partitioned parameters counted whole.

    None where there is no such method.
    """
    count: Any = getattr(model, "num_parameters", None)
    if not callable(count):
        return None
    left_out = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)] if exclude_embeddings else []
    ids = {id(parameter) for module in left_out for parameter in module.parameters()}
    unseen = (p for p in model.parameters() if is_divided(p) and p.numel() == 0 and id(p) not in ids)
    own = int(count(exclude_embeddings=True)) if exclude_embeddings else int(count())
    return own + sum(whole_shape(parameter).numel() for parameter in unseen)
