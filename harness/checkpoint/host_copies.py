"""Copies of tensors in reused host memory, for a writer to read while the training goes on."""

from __future__ import annotations

import copy
from typing import Any

import torch


class HostCopies:
    """
    Copies of nested states, in host memory that the next copy uses again.

    Tensors that share memory share it in the copy too, so that a file written from the copy equals one written from the
    original. A copy is valid until the next one is made.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._taken: dict[tuple[torch.device, int], torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """The memory that is kept between copies, in bytes."""
        return sum(buffer.numel() for buffer in self._buffers)

    def copy(self, state: Any) -> Any:
        """Local: copy dicts, lists, tuples and the tensors in them; waits for the device once."""
        self._taken = {}
        copied = self._copied(state)
        for device in {device for device, _ in self._taken if device.type != "cpu"}:
            torch.accelerator.synchronize(device)
        self._taken = {}  # the originals may be freed and their addresses reused
        return copied

    def _copied(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copied_tensor(value)
        if isinstance(value, dict):
            same_type = copy.copy(value)  # an OrderedDict, with its attributes
            same_type.update({name: self._copied(each) for name, each in value.items()})
            return same_type
        if type(value) in (list, tuple):
            return type(value)(self._copied(each) for each in value)
        return copy.deepcopy(value)

    def _copied_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.untyped_storage().nbytes() == 0:
            return tensor.cpu().clone()  # quantized, sparse or empty tensors are few and small
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        if key not in self._taken:
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._taken[key] = self._buffer(len(self._taken), source)
            self._taken[key].copy_(source, non_blocking=True)
        view = torch.empty(0, dtype=tensor.dtype)
        kept = self._taken[key].untyped_storage()
        return view.set_(kept, tensor.storage_offset(), tensor.size(), tensor.stride())

    def _buffer(self, index: int, source: torch.Tensor) -> torch.Tensor:
        """
        Return the buffer of the index-th memory block, pinned for a device's.

        States keep their order between saves.
        """
        is_pinned = source.device.type != "cpu"
        if index < len(self._buffers):
            kept = self._buffers[index]
            if kept.numel() == source.numel() and kept.is_pinned() == is_pinned:
                return kept
        fresh = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=is_pinned)
        self._buffers[index : index + 1] = [fresh]
        return fresh
