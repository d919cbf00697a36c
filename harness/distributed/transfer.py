"""Move values between host and device with few waits: each wait of the host for the device is a host sync."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import torch
from accelerate import Accelerator

# How struct and torch name the bits of a float32, a float64 and an integer.
SINGLE, DOUBLE, INTEGER = "f", "d", "q"
WHOLE = {SINGLE: "i", DOUBLE: "q", INTEGER: "q"}


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a small tensor of host memory on the device, without waiting for it where that is safe."""
    # CUDA copies what is not pinned before it returns; MPS may read the memory when it is another tensor's already.
    return tensor.to(device, non_blocking=device.type == "cuda")


def gather_numbers(accelerator: Accelerator, values: Mapping[str, torch.Tensor | float]) -> list[dict[str, float]]:
    """
    Collective: return the numbers of each rank by name, by one gather and one host sync.

    The ranks give the same names and types; tensors are scalars on the device. Each number comes back as it was, an
    integer tensor as an int: what travels is its bits in int64, since float32 is too short for counts and not every
    device has float64.
    """
    kinds = [_kind(value) for value in values.values()]
    on_host = [float(value) for value in values.values() if not isinstance(value, torch.Tensor)]
    sent = to_device(torch.tensor(on_host, dtype=torch.float64, device="cpu").view(torch.int64), accelerator.device)
    unread = iter(sent.unbind())
    row = [_bits(value) if isinstance(value, torch.Tensor) else next(unread) for value in values.values()]
    gathered = accelerator.gather(torch.stack([bits.to(accelerator.device) for bits in row]).unsqueeze(0))
    return [dict(zip(values, map(_number, kinds, bits), strict=True)) for bits in gathered.tolist()]


def _kind(value: torch.Tensor | float) -> str:
    if not isinstance(value, torch.Tensor) or value.dtype == torch.float64:
        return DOUBLE
    return SINGLE if value.is_floating_point() else INTEGER


def _bits(value: torch.Tensor) -> torch.Tensor:
    """A scalar's bits as int64; half precision as float32, which holds each of its values."""
    value = value.detach().reshape(())
    if not value.is_floating_point():
        return value.to(torch.int64)
    if value.dtype == torch.float64:
        return value.view(torch.int64)
    return value.float().view(torch.int32).to(torch.int64)


def _number(kind: str, bits: int) -> float:
    number: float = struct.unpack(kind, struct.pack(WHOLE[kind], bits))[0]
    return number
