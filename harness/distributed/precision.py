"""Mixed precision: check what flags and launch config ask for, and that Accelerate has set it up."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils.imports import is_torchao_available
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available
from transformers.utils.import_utils import enable_tf32

from harness.distributed.launch import where
from harness.errors import ConfigError

PRECISIONS = ("no", "bf16", "fp16", "fp8")
FP8_CAPABILITY = (8, 9)  # Ada and Hopper


def check_precision(launched: str, asked: str | None, *, on_cpu: bool) -> None:
    """
    Refuse a precision that is not possible here, before the Accelerator is made; raises ConfigError.

    `launched` is the launch config's, `asked` the flags', None if they leave it to the launch config.
    """
    if launched not in PRECISIONS:
        raise ConfigError(
            f"mixed_precision: {launched} of the launch config is not known; "
            f"use {', '.join(PRECISIONS)}: change {where('mixed_precision')}."
        )
    if asked and launched not in ("no", asked):
        raise ConfigError(
            f"--{asked} contradicts mixed_precision: {launched} of the launch config; "
            f"leave --{asked} out, or change {where('mixed_precision')}."
        )
    if on_cpu and asked == "fp16":
        raise ConfigError("--fp16 needs an accelerator; use bf16.")
    if on_cpu and launched in ("fp16", "fp8"):
        raise ConfigError(f"{launched} needs an accelerator; use bf16: change {where('mixed_precision')}.")
    if asked == "bf16" and torch.cuda.is_available() and not on_cpu and not is_torch_bf16_gpu_available():
        raise ConfigError("--bf16 needs an Ampere GPU or newer; use --fp16.")


def check_fp8(backend: str) -> None:
    """
    Refuse fp8 on a device or with a package that does not support it; raises ConfigError.

    `backend` is the launch config's, "NO" if it leaves the choice to accelerate, which prefers torchao.
    """
    change = f"change {where('mixed_precision')}"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise ConfigError(f"mixed_precision: fp8 needs an Ada or Hopper GPU or newer; use bf16: {change}.")
    if backend not in ("NO", "AO"):
        raise ConfigError(
            f"fp8 with the backend {backend} is not supported: its layers have other weights than the model's, so "
            f"from_pretrained would not load what is saved. Use AO (torchao): change {where('backend')}."
        )
    if not is_torchao_available():
        raise ConfigError(f"mixed_precision: fp8 needs torchao: pip install torchao, or use bf16: {change}.")


def check_result(accelerator: Accelerator, launched: str, asked: str | None) -> None:
    """Compare the precision that accelerate has set up with what was asked for; raises ConfigError."""
    kind, got = accelerator.distributed_type, accelerator.mixed_precision
    wanted = asked or launched
    if wanted == "no" and kind == DistributedType.DEEPSPEED:
        return  # DeepSpeed's own configuration file may set it instead
    if got != wanted:
        flags = f"--{asked}" if asked else f"mixed_precision: {launched} of the launch config"
        raise ConfigError(
            f"{flags} was asked for, and accelerate trains with {got}: an Accelerator made before, or this device, "
            f"decided otherwise. Change {where('mixed_precision')}."
        )
    if got == "fp8" and kind not in (DistributedType.NO, DistributedType.MULTI_GPU):
        raise ConfigError(
            f"mixed_precision: fp8 is not supported with distributed_type: {kind.value}; use bf16 (change "
            f"{where('mixed_precision')}), or launch_configs/ddp.yaml."
        )


def set_tf32(wanted: bool | None, *, compiles: bool, device: torch.device) -> None:
    """Switch TF32 as asked; by default as the Trainer does, which turns it on when it compiles."""
    if wanted is not None:
        if is_torch_tf32_available():
            enable_tf32(wanted)
        elif wanted:
            raise ConfigError("--tf32 needs an Ampere GPU or newer; leave it out.")
    elif compiles and device.type == "cuda" and is_torch_tf32_available():
        enable_tf32(True)
