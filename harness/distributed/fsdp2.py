"""FSDP2: the model in shards, and the optimizer's shards in a checkpoint, for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from harness.errors import ConfigError
from harness.files import load_safely

OPTIMIZER_FILES = "optimizer_rank_*.pt"


def is_fsdp(accelerator: Accelerator) -> bool:
    """Whether FSDP2 shards the model."""
    return bool(accelerator.is_fsdp2)


def set_up_fsdp(accelerator: Accelerator) -> None:
    """
    Do on the CPU what AcceleratorState does by itself on accelerators only, so that Accelerate prepares for FSDP2.

    torch's `fully_shard` works over gloo as over NCCL; all that follows is Accelerate's own way.
    """
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # only for a device to copy from
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if accelerator.is_fsdp2 and accelerator.mixed_precision != "no":
        # Accelerate's own policy adds up gradients and returns the loss in 16 bits, unlike its DDP.
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float16
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def writers_group(accelerator: Accelerator) -> Callable[[BaseException | None], str | None]:
    """Collective: an `agree` of its own, for threads of all ranks while their main threads do something else."""
    group, num_processes = torch.distributed.new_group(backend="gloo"), accelerator.num_processes

    def agree_among(error: BaseException | None) -> str | None:
        messages: list[str | None] = [None] * num_processes
        own = None if error is None else f"{error}" or type(error).__name__
        torch.distributed.all_gather_object(messages, own, group=group)
        return next((found for found in messages if found is not None), None)

    return agree_among


def prepare_fsdp(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """
    Local: choose the layers that are sharded one by one, before `prepare`.

    Raises ConfigError for a model that Accelerate's FSDP2 can't shard.
    """
    model_name, plugin = type(model).__name__, accelerator.state.fsdp_plugin
    embeddings = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    holders: dict[torch.nn.Parameter, dict[str, torch.nn.Module]] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            holders.setdefault(parameter, {})[f"{name}.{own}"] = module
    for names in holders.values():
        # Accelerate shards the two embeddings together if they are tied, and knows no other tied weights.
        if len(names) > 1 and not all(any(module is each for each in embeddings) for module in names.values()):
            raise ConfigError(
                f"Accelerate's FSDP2 can't shard {model_name}, where {' and '.join(names)} are one weight: "
                "use launch_configs/zero3.yaml or ddp.yaml."
            )
    buffers = sorted(set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if plugin.cpu_ram_efficient_loading and buffers:
        raise ConfigError(
            f"fsdp_cpu_ram_efficient_loading: true in the launch config can't be used with {model_name}, "
            f"which saves {buffers[0]}, no parameter: write false."
        )
    if plugin.transformer_cls_names_to_wrap is None and getattr(model, "_no_split_modules", None):
        # Accelerate shards the embeddings by themselves; within a layer of its own it can't.
        held = {
            type(module).__name__
            for module in model.modules()
            if any(each is embeddings[0] for each in module.modules())
        }
        plugin.transformer_cls_names_to_wrap = sorted(set(model._no_split_modules) - held)  # type: ignore[arg-type]


def check_sharded(model: torch.nn.Module) -> None:
    """
    Let `generate` run on a model that `prepare` has sharded: weights are whole meanwhile, and ranks end together.

    Raises ConfigError for parameters that are not in shards.
    """
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise ConfigError(f"FSDP did not shard {len(whole)} parameters (the first: {whole[0]}).")
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
        model._is_fsdp_managed_module = True  # type: ignore[assignment] # read by generate


def shard_for_evaluation(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """Collective: shard a model that is not trained, as `prepare` does with one that is; it asks for an optimizer."""
    prepare_fsdp(accelerator, model)
    sharded: torch.nn.Module = fsdp2_prepare_model(accelerator, model)
    check_sharded(sharded)
    return sharded


def is_cut(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether this rank holds some rows of it."""
    return isinstance(tensor, DTensor)


def joined(tensor: torch.Tensor) -> torch.Tensor:
    """Collective: the whole tensor, on the device; one that is not cut is what it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: DTensor, rows: Any) -> None:
    """Local: set a tensor that is cut from whole `rows`: of what can be sliced other ranks' stay unread."""
    start, stop = _rows_of(tensor)
    tensor.to_local().copy_(rows[start:stop])


def _rows_of(tensor: DTensor, count: int | None = None) -> tuple[int, int]:
    """The rows of a tensor, or of one with `count` that is sharded alike, that this rank has: torch.chunk's part."""
    mesh, count = tensor.device_mesh, tensor.shape[0] if count is None else count
    a_part = -(-count // mesh.size())
    start = min(mesh.get_local_rank() * a_part, count)
    return start, min(start + a_part, count)


def optimizer_file(process_index: int) -> str:
    """The file of a checkpoint that holds a rank's part of the optimizer's state."""
    return OPTIMIZER_FILES.replace("*", str(process_index))


def optimizer_shard(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """
    Local: the optimizer's state dict with this rank's rows in place of sharded tensors: plain values and tensors.

    Each is {"rows": tensor, "start": index of the first, "shape": of the whole tensor}. Raises ConfigError for an
    optimizer whose state is placed otherwise.
    """
    state = optimizer.state_dict()
    shards = {
        index: {name: _shard(value) for name, value in values.items()} for index, values in state["state"].items()
    }
    return {**state, "state": shards}


def _shard(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    if tuple(value.placements) != (Shard(0),):
        raise ConfigError(f"This optimizer keeps a tensor placed as {value.placements}; use another --optim with FSDP.")
    return {"rows": value.to_local(), "start": _rows_of(value)[0], "shape": list(value.shape)}


def has_optimizer_shards(folder: Path) -> bool:
    """Whether a checkpoint was saved under FSDP2."""
    return (folder / optimizer_file(0)).is_file()


def read_optimizer(folder: Path, *, ranks: tuple[int, int], is_sharded: bool) -> list[dict[str, Any]]:
    """
    Local: what `optimizer_shard` gave: this rank's alone if it is sharded among as many again, else that of all.

    Tensors are mapped, not read. Raises ConfigError for a file that holds anything but plain values and tensors.
    """
    count = len(list(folder.glob(OPTIMIZER_FILES)))
    wanted = [ranks[0]] if is_sharded and count == ranks[1] else range(count)
    return [load_safely(folder / optimizer_file(rank), "cpu", [], mmap=True) for rank in wanted]


def load_optimizer(optimizer: torch.optim.Optimizer, parts: Sequence[Mapping[str, Any]]) -> None:
    """
    Local: take back a state dict, whole or in parts of several ranks, each parameter's as that is sharded now.

    Raises ValueError or KeyError if it is another optimizer's.
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


def _placed(saved: Sequence[Any], parameter: torch.Tensor) -> Any:
    """A value of the optimizer's state, as this rank holds it: from the parts of ranks, or from the whole."""
    first = saved[0]
    if isinstance(first, Mapping) and "rows" in first:
        parts, shape = [(part["start"], part["rows"]) for part in saved], torch.Size(first["shape"])
    elif isinstance(first, torch.Tensor) and first.dim():
        parts, shape = [(0, first)], first.shape
        if isinstance(parameter, DTensor) and shape != parameter.shape:
            raise ValueError(f"a state of the shape {list(shape)} is not cut like a parameter")
    else:
        return first.clone() if isinstance(first, torch.Tensor) else first  # the file may be deleted
    if not isinstance(parameter, DTensor):
        return _rows(parts, 0, shape[0])
    local = _rows(parts, *_rows_of(parameter, shape[0])).to(parameter.to_local().device)
    stride = torch.empty(shape, device="meta").stride()
    placement = (parameter.device_mesh, parameter.placements)
    return DTensor.from_local(local, *placement, run_check=False, shape=shape, stride=stride)


def _rows(parts: Sequence[tuple[int, torch.Tensor]], start: int, stop: int) -> torch.Tensor:
    """Rows `start` to `stop` of a tensor given in parts, in new memory. Raises ValueError if some are missing."""
    found = torch.cat([rows[max(start - first, 0) : max(stop - first, 0)] for first, rows in parts])
    if len(found) != stop - start:
        raise ValueError(f"rows {start} to {stop} are not in it")
    return found
