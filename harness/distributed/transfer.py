"""Move values between host and device, and sum them up over the ranks, with few waits: of a device, of other ranks."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils._pytree import tree_map_only

# How struct and torch name the bits of a float32, a float64 and an integer.
SINGLE, DOUBLE, INTEGER = "f", "d", "q"
WHOLE = {SINGLE: "i", DOUBLE: "q", INTEGER: "q"}
# What can be asked of an Awaited without waiting for it: all that says what and where it is.
PROPERTIES = ("device", "dtype", "shape", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu")
METHODS = ("dim", "size", "numel", "is_floating_point", "is_complex")
KNOWN_BEFORE = frozenset(
    (
        *(getattr(torch.Tensor, name).__get__ for name in PROPERTIES),
        *(getattr(torch.Tensor, name) for name in METHODS),
        *(torch.numel, torch.is_floating_point, torch.is_complex),
    )
)


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


class Awaited(torch.Tensor):
    """
    A scalar that other work need not wait for: whatever is done with it waits for its value, and works on that.

    So a model whose loss divides by it can be given it while it is still on its way. Its type and its device are known
    before. A compiler can't trace it: what is compiled takes what `wait` returns.
    """

    _obtain: Callable[[], torch.Tensor]
    _value: torch.Tensor | None

    @staticmethod
    def __new__(cls, obtain: Callable[[], torch.Tensor], *, dtype: torch.dtype, device: torch.device) -> Awaited:
        """Make one whose value `obtain` returns once it is there; it is called once."""
        made: Awaited = torch.Tensor._make_wrapper_subclass(cls, (), dtype=dtype, device=device)
        made._obtain, made._value = obtain, None
        return made

    def wait(self) -> torch.Tensor:
        """Return the value, an ordinary tensor, once it is there."""
        if self._value is None:
            self._value = self._obtain()
        return self._value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in KNOWN_BEFORE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override, unused-ignore]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found_args, found_kwargs = tree_map_only(cls, cls.wait, (args, dict(kwargs or {})))
        return func(*found_args, **found_kwargs)


def known(value: Any) -> Any:
    """Return a value; if it is an Awaited, the one that it stands for, once it is there."""
    return value.wait() if isinstance(value, Awaited) else value


def then(value: Any, function: Callable[[Any], Any], dtype: torch.dtype = torch.float32) -> Any:
    """Return `function` of a value: at once, or for an Awaited as one more, of this type."""
    if not isinstance(value, Awaited):
        return function(value)
    return Awaited(lambda: function(value.wait()), dtype=dtype, device=value.device)


def sum_over_ranks(accelerator: Accelerator, numbers: Sequence[torch.Tensor | int]) -> list[torch.Tensor]:
    """Collective: begin to sum up integer scalars over the ranks; return the sums, each an Awaited. No host sync."""
    device = accelerator.device
    tensors = [
        each if isinstance(each, torch.Tensor) else to_device(torch.tensor(each, device="cpu"), device)
        for each in numbers
    ]
    sums = torch.stack(tensors)
    work = torch.distributed.all_reduce(sums, async_op=True)

    def summed(i: int) -> torch.Tensor:
        work.wait()
        return sums[i]

    return [Awaited(partial(summed, i), dtype=sums.dtype, device=device) for i in range(len(numbers))]
