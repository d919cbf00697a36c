"""Build the Accelerator, and check that the launch did what its configuration says."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.utils import (
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
    is_deepspeed_available,
)

import harness
from harness.config import choice, release
from harness.distributed.backend import Backend
from harness.distributed.compiled_ops import remove_stale_lock
from harness.distributed.devices import check_shared_devices
from harness.distributed.flags import TopologyConfig
from harness.distributed.fsdp2 import FSDP2, set_up_fsdp
from harness.distributed.launch import Launch, find_launch, where
from harness.distributed.precision import check_fp8, check_precision, check_result, set_tf32
from harness.distributed.ranks import OWN_KEYS
from harness.distributed.replicated import Replicated
from harness.distributed.zero import Zero
from harness.errors import ConfigError

# An older one fails our tests of it.
LOWEST_TORCH_OF_FSDP = (2, 9)
SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
)


def check_compile_backend(config: TopologyConfig) -> None:
    """Raise ConfigError for a backend that torch does not know."""
    if config.torch_compile_backend is not None:
        backends = torch.compiler.list_backends(exclude_tags=())
        choice("torch_compile_backend", config.torch_compile_backend, backends)


def build_accelerator(config: TopologyConfig, *, activation_checkpointing: bool) -> Accelerator:
    """
    Collective: make the Accelerator as the Trainer makes its own, and check the launch.

    Raises ConfigError for a launch that would do something else than it says.
    """
    uses_deepspeed, uses_fsdp = _is_on("ACCELERATE_USE_DEEPSPEED"), _is_on("ACCELERATE_USE_FSDP")
    launch = find_launch() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
    if launch is not None and launch.uses_cpu:  # with several processes accelerate does not pass it on
        config = replace(config, use_cpu=True)
    on_cpu = config.use_cpu or _launched_without_accelerator(or_sharded=uses_fsdp)
    _check_launch_config(config, launch)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    check_precision(precision, config.mixed_precision, on_cpu=on_cpu or not torch.accelerator.is_available())
    if not on_cpu and _launched_processes() > 1:
        check_shared_devices(config.ddp_backend)
    if precision == "fp8":
        check_fp8(os.environ.get("ACCELERATE_FP8_BACKEND", "NO").upper())
    if uses_deepspeed and not torch.accelerator.is_available() and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        remove_stale_lock()
    # accelerate takes a given backend to mean that there is a process group.
    backend = (config.ddp_backend or ("gloo" if on_cpu else None)) if _launched_processes() > 1 else None
    ddp: dict[str, Any] = {"find_unused_parameters": not activation_checkpointing}
    for name in ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph"):
        if (value := getattr(config, f"ddp_{name}")) is not None:
            ddp[name] = value
    accelerator = Accelerator(
        cpu=on_cpu and not uses_deepspeed,  # cpu=True would turn DeepSpeed off
        mixed_precision=config.mixed_precision,
        # The loop draws and counts the micro-batches itself; accelerate must not divide by their number again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(
            backend=(config.torch_compile_backend or "inductor") if config.compiles else None,
            mode=config.torch_compile_mode,
        ),
        kwargs_handlers=[
            DistributedDataParallelKwargs(**ddp),
            InitProcessGroupKwargs(
                backend=backend, init_method=OWN_KEYS, timeout=timedelta(seconds=config.ddp_timeout)
            ),
        ],
    )
    if uses_fsdp:
        set_up_fsdp(accelerator)
    _check_processes(accelerator)
    check_result(accelerator, precision, config.mixed_precision)
    set_tf32(config.tf32, by_default=config.compiles and not config.fp16, device=accelerator.device)
    return accelerator


def choose_backend(accelerator: Accelerator) -> Backend:
    """Local: return the backend for the launch: replicated, FSDP2 or ZeRO."""
    if accelerator.is_fsdp2:
        return FSDP2(accelerator)
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return Zero(accelerator) if is_deepspeed else Replicated(accelerator)


def _launched_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _launched_without_accelerator(*, or_sharded: bool) -> bool:
    # Without this a MULTI_GPU launch config on a machine without accelerator starts processes that know nothing of
    # each other: each trains its own copy.
    return (_launched_processes() > 1 or or_sharded) and not torch.accelerator.is_available()


def _check_launch_config(config: TopologyConfig, launch: Launch | None) -> None:
    if _is_on("ACCELERATE_USE_FSDP"):
        _check_fsdp(config)
        _check_compiled(launch, "FSDP")
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        _check_deepspeed(config)
        _check_compiled(launch, "DeepSpeed")
    expected, started = config.expect_num_processes, _launched_processes()
    if expected is not None and expected != started:
        raise ConfigError(
            f"--expect_num_processes={expected}, but the launcher started {started}: "
            "check num_processes and distributed_type of the launch config (MULTI_CPU starts one process; "
            "use MULTI_GPU, it falls back to CPU processes by itself)."
        )
    asked = launch.num_processes if launch is not None and not launch.uses_mpi else None
    if launch is not None and asked not in (None, started):
        kind = (
            "MULTI_CPU, NO and --cpu start one. Use MULTI_GPU, which takes CPU processes where there is no accelerator "
            f"(launch_configs/cpu_2.yaml): change {launch.where('distributed_type')}."
            if started == 1
            else f"it is the number on all machines, a multiple of theirs: change {launch.where('num_processes')}."
        )
        raise ConfigError(f"accelerate launch was asked for {asked} processes and started {started}: {kind}")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")


def _check_deepspeed(config: TopologyConfig) -> None:
    if not is_deepspeed_available():
        raise ConfigError(
            "The launch config says distributed_type: DEEPSPEED, and deepspeed is not installed: "
            "pip install 'accelerate-harness[deepspeed]', or use launch_configs/ddp.yaml, or change "
            f"{where('distributed_type')}."
        )
    if config.compiles:
        raise ConfigError("--torch_compile is not supported with DeepSpeed by this version; leave it out.")
    if config.use_cpu and torch.accelerator.is_available():
        raise ConfigError(
            "--use_cpu (or use_cpu: true) turns DeepSpeed off; leave it out, or use launch_configs/ddp.yaml."
        )


def _check_compiled(launch: Launch | None, backend: str) -> None:
    # For DeepSpeed accelerate does not pass it on, so that nothing would be compiled.
    given = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    compiler = given if given.lower() != "no" else launch.compile_backend if launch is not None else ""
    if compiler:
        raise ConfigError(
            f"dynamo_config in the launch config asks for torch.compile ({compiler}), which is not supported with "
            f"{backend} by this version; write `dynamo_backend: 'NO'`: change {where('dynamo_backend')}."
        )


def _check_fsdp(config: TopologyConfig) -> None:
    if release("torch") < LOWEST_TORCH_OF_FSDP:
        lowest = ".".join(map(str, LOWEST_TORCH_OF_FSDP))
        raise ConfigError(
            f"The launch config says distributed_type: FSDP. FSDP2 needs torch {lowest} or newer, and this is "
            f"{version('torch')}: update it, or use launch_configs/ddp.yaml, or change {where('distributed_type')}."
        )
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "The launch config says distributed_type: FSDP without fsdp_version: 2, and FSDP1 is not supported: "
            f"use launch_configs/fsdp2.yaml, or change {where('fsdp_version')}."
        )
    if _is_on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "fsdp_activation_checkpointing: true in the launch config is not supported; "
            f"give --activation_checkpointing in its place: change {where('fsdp_activation_checkpointing')}."
        )
    if _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ConfigError("parallelism_config in the launch config is not supported with FSDP; leave it out.")
    if config.compiles:
        raise ConfigError("--torch_compile is not supported with FSDP by this version; leave it out.")
    if config.use_cpu and torch.accelerator.is_available():
        raise ConfigError("--use_cpu turns FSDP off; leave it out, or use launch_configs/ddp.yaml.")


def _check_processes(accelerator: Accelerator) -> None:
    launched = _launched_processes()
    in_group = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    separate = launched > 1 and accelerator.distributed_type == DistributedType.NO
    if separate or not launched == in_group == accelerator.num_processes:
        raise ConfigError(
            f"The launcher started {launched} processes, the process group has {in_group} and accelerate "
            f"{accelerator.num_processes} ({accelerator.distributed_type}): each would train a copy of its own. "
            "Use distributed_type: MULTI_GPU in the launch config (launch_configs/ddp.yaml), or start one process "
            f"(accelerate launch --num_processes 1): change {where('distributed_type')}."
        )
    for asked in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        if _is_on(f"ACCELERATE_USE_{asked.value}") and accelerator.distributed_type != asked:
            raise ConfigError(
                f"The launch config says distributed_type: {asked.value}, but accelerate made it "
                f"{accelerator.distributed_type.value}: nothing would be sharded. Start it with accelerate launch, "
                f"or change {where('distributed_type')}."
            )
    if accelerator.distributed_type not in SUPPORTED:
        raise ConfigError(
            f"distributed_type: {accelerator.distributed_type.value} is not supported by this version; "
            f"use launch_configs/ddp.yaml or single.yaml, or change {where('distributed_type')}."
        )


def software() -> dict[str, str | int]:
    """Return what the last bits of a number depend on besides the data: versions, and the number of CPU threads."""
    return {**_versions(), "accelerate-harness": harness.__version__, "num_threads": torch.get_num_threads()}


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("accelerate", "torch", "transformers")}
