"""Mixed precision: check what flags and launch config ask for, and that Accelerate has set it up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils.imports import is_torchao_available

from harness.distributed.launch import where
from harness.errors import ConfigError

PRECISIONS = ("no", "bf16", "fp16", "fp8")
FP8_CAPABILITY = (8, 9)  # Ada and Hopper
TF32_CAPABILITY = (8, 0)  # Ampere


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
    if "bf16" in (launched, asked) and not on_cpu and torch.cuda.is_available():
        _check_bf16(asked)


def _check_bf16(asked: str | None) -> None:
    # Without the argument torch counts emulation, which is slower than float32, and tries it on the device.
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        if asked == "bf16":
            raise ConfigError("--bf16 needs an Ampere GPU or newer; use --fp16.")
        raise ConfigError(f"bf16 needs an Ampere GPU or newer; use fp16: change {where('mixed_precision')}.")


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


def set_tf32(wanted: bool | None, *, by_default: bool, device: torch.device) -> None:
    """
    Switch TF32 of matrix products and convolutions as asked.

    If nothing is asked it is turned on where it is so by default, as by the Trainer when it compiles; else it stays
    what torch and accelerate have made it. Call it after the Accelerator is made, which turns it on when it compiles.
    """
    is_there = (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= TF32_CAPABILITY
    )
    if wanted and not is_there:
        raise ConfigError("--tf32 needs an Ampere GPU or newer; leave it out.")
    chosen = by_default or None if wanted is None else wanted
    if is_there and chosen is not None:
        _choose_tf32(matmul=chosen, convolutions=chosen)


@contextmanager
def tf32_kept() -> Iterator[None]:
    """Restore at the end of the block what is chosen for TF32 now: a later run in this process begins as this one."""
    before = _tf32()
    try:
        yield
    finally:
        if _tf32() != before:
            _choose_tf32(**before)


def _tf32() -> dict[str, bool]:
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):  # torch below 2.9
        return {"matmul": backends.cuda.matmul.allow_tf32, "convolutions": backends.cudnn.allow_tf32}
    # `allow_tf32` raises where the two ways to choose were mixed, as transformers' `enable_tf32` does.
    matmul, convolutions = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
    return {"matmul": matmul == "tf32", "convolutions": convolutions == "tf32"}


def _choose_tf32(*, matmul: bool, convolutions: bool) -> None:
    # By the older of torch's two ways, which accelerate takes, and which is the only one below torch 2.9: it keeps what
    # the newer one reads equal, but not the reverse, and torch.compile reads both ("a mix of the legacy and new APIs").
    backends: Any = torch.backends
    if getattr(backends, "fp32_precision", "none") != "none":
        backends.fp32_precision = "none"  # a Trainer's choice for all kinds at once, which would hold for convolutions
    backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = matmul, convolutions
