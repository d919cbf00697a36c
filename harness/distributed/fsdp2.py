"""The backend of FSDP2: each rank holds some rows of each weight, gradient and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, register_fsdp_forward_method

from harness.distributed.backend import OPTIMIZER_FILE, OptimizerFiles, Stepper, StepSize
from harness.distributed.optimizer_shards import (
    has_optimizer_shards,
    load_optimizer,
    optimizer_file,
    optimizer_shard,
    read_optimizer,
)
from harness.distributed.ranks import gloo_group, ranks_of
from harness.distributed.replicated import AcceleratedStepper
from harness.distributed.sharding import is_cut, whole_on_first
from harness.errors import ConfigError


class FSDP2:
    """The backend of FSDP2. Its checkpoints can be resumed by any number of ranks, and under DDP."""

    is_sharded = True
    zero_stage = 0

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, size: StepSize
    ) -> tuple[torch.nn.Module, AcceleratedOptimizer, Stepper]:
        """Collective: see Backend. Raises ConfigError for a model that can't be sharded."""
        prepare_fsdp(self.accelerator, model)
        wrapped, prepared = self.accelerator.prepare(model, optimizer)
        check_sharded(wrapped)
        # Reducing only at the last micro-batch would keep whole gradients on each device, and FSDP2 is to save memory.
        return wrapped, prepared, AcceleratedStepper(self.accelerator, wrapped, prepared, reduces_each=True)

    def prepare_for_evaluation(self, model: torch.nn.Module, size: StepSize) -> torch.nn.Module:
        """
        Collective: shard a model without an optimizer, as `prepare` does.

        Accelerate's own `prepare` requires one.
        """
        prepare_fsdp(self.accelerator, model)
        sharded: torch.nn.Module = fsdp2_prepare_model(self.accelerator, model)
        check_sharded(sharded)
        return sharded

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Collective: return copies on rank zero."""
        return whole_on_first(tensors)

    def save_optimizer(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, step: int) -> OptimizerFiles:
        """Local: return this rank's rows. Raises ConfigError for an optimizer whose state is sharded otherwise."""
        return OptimizerFiles(rank_files={optimizer_file(self.accelerator.process_index): optimizer_shard(optimizer)})

    def load_optimizer(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, files: Mapping[str, Any]
    ) -> None:
        """Local: load from the shards of any number of ranks, or from the Trainer's file."""
        if has_optimizer_shards(folder):
            parts = read_optimizer(folder, ranks=ranks_of(self.accelerator), is_sharded=True)
        else:
            parts = [files[OPTIMIZER_FILE]]
        load_optimizer(optimizer, parts)

    def gradient_function(self) -> None:
        """Return None: a parameter's `grad` is there, sharded like the parameter."""

    def writers_agreement(self) -> Callable[[BaseException | None], str | None]:
        """Collective: make a process group for the writers, and return the agreement on it."""
        group, num_processes = gloo_group(self.accelerator), self.accelerator.num_processes

        def agree_among(error: BaseException | None) -> str | None:
            messages: list[str | None] = [None] * num_processes
            own = None if error is None else f"{error}" or type(error).__name__
            torch.distributed.all_gather_object(messages, own, group=group)
            return next((found for found in messages if found is not None), None)

        return agree_among


def set_up_fsdp(accelerator: Accelerator) -> None:
    """
    Set up FSDP2 on the CPU as AcceleratorState does on accelerators only, so that Accelerate prepares for it.

    torch's `fully_shard` works over gloo as over NCCL; the rest is done by Accelerate.
    """
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # there is no device
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if accelerator.is_fsdp2 and accelerator.mixed_precision != "no":
        # Accelerate's own policy adds up gradients and returns the loss in 16 bits, unlike its DDP.
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float16
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def prepare_fsdp(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """
    Local: choose the layers that are sharded one by one; call it before `prepare`.

    Raises ConfigError for a model that Accelerate's FSDP2 can't shard.
    """
    model_name, plugin = type(model).__name__, accelerator.state.fsdp_plugin
    embeddings = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    holders: dict[torch.nn.Parameter, dict[str, torch.nn.Module]] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            holders.setdefault(parameter, {})[f"{name}.{own}"] = module
    for names in holders.values():
        # Accelerate shards the two embeddings together if they are tied, and handles no other tied weights.
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
        # Accelerate shards the embeddings separately, which it can't inside of a layer that is sharded itself.
        held = {
            type(module).__name__
            for module in model.modules()
            if any(each is embeddings[0] for each in module.modules())
        }
        plugin.transformer_cls_names_to_wrap = sorted(set(model._no_split_modules) - held)  # type: ignore[arg-type]


def check_sharded(model: torch.nn.Module) -> None:
    """
    Make `generate` work on a model that `prepare` has sharded: weights are gathered and ranks end together.

    Raises ConfigError for parameters that are not in shards.
    """
    whole = [name for name, parameter in model.named_parameters() if not is_cut(parameter)]
    if whole:
        raise ConfigError(f"FSDP did not shard {len(whole)} parameters (the first: {whole[0]}).")
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
        model._is_fsdp_managed_module = True  # type: ignore[assignment] # read by generate
