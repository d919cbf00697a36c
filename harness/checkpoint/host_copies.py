"""Copies of tensors in reused host memory, for a writer to read while the training goes on."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch

logger = logging.getLogger(__name__)

ALIGNMENT = 16  # bytes: the largest element of any dtype
SMALL_CHUNK = 1 << 20

Key = tuple[torch.device, int]
Storage = torch.UntypedStorage


class HostCopies:
    """
    Copies of nested states, in host memory that the next copy uses again: pinned for what comes from a device.

    Tensors that share memory share it in the copy too, so that a file written from the copy equals one written from the
    original. A copy is valid until the next one is made.
    """

    def __init__(self) -> None:
        self._pinned, self._ordinary = Arena(pinned=True), Arena(pinned=False)

    @property
    def num_bytes(self) -> int:
        """The memory that is kept between copies, in bytes, with what it was rounded up by."""
        return self._pinned.num_bytes + self._ordinary.num_bytes

    def copy(self, state: Any) -> Any:
        """
        Local: copy dicts, lists, tuples and the tensors in them; waits for the device once.

        Raises MemoryError if the host has no memory for it.
        """
        originals = {_key(tensor): tensor.untyped_storage() for tensor in _tensors(state) if _has_storage(tensor)}
        try:
            copied = self._copied(originals)
        except MemoryError:
            self._pinned.clear()
            self._ordinary.clear()
            raise
        return _rebuilt(state, copied)

    def _copied(self, originals: Mapping[Key, Storage]) -> dict[Key, Storage]:
        copied: dict[Key, Storage] = {}
        for arena in (self._pinned, self._ordinary):
            keys = [key for key in originals if (key[0].type != "cpu") == arena.pinned]
            for key, block in zip(keys, arena.blocks([originals[key].nbytes() for key in keys]), strict=True):
                source = torch.empty(0, dtype=torch.uint8, device=key[0]).set_(originals[key])
                block.copy_(source, non_blocking=True)
                start = block.storage_offset()
                # A file holds whole storages: each original has its own.
                copied[key] = block.untyped_storage()[start : start + block.numel()]
        for device in {device for device, _ in originals if device.type != "cpu"}:
            torch.accelerator.synchronize(device)
        return copied


class Arena:
    """
    Host memory in a few chunks, divided among blocks.

    Torch rounds each piece of pinned memory up to a power of two, which is up to twice what is needed: here only the
    chunks are such pieces, of sizes that are powers of two already.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._chunks: list[torch.Tensor] = []
        self._has_warned = False

    @property
    def num_bytes(self) -> int:
        """The size of all chunks."""
        return sum(chunk.numel() for chunk in self._chunks)

    def clear(self) -> None:
        """Give the memory back; torch keeps what is pinned for the next."""
        self._chunks.clear()

    def blocks(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """
        Return one-dimensional uint8 tensors of these numbers of bytes, in memory that blocks of before may have had.

        Where it can't be pinned it is ordinary memory, with a warning. Raises MemoryError if there is none either.
        """
        chunks, places = plan(sizes, rounded=self.pinned)
        present = [chunk.numel() for chunk in self._chunks[: len(chunks)]]
        if len(present) < len(chunks) or any(has < needs for has, needs in zip(present, chunks, strict=True)):
            self.clear()  # the new ones may take the memory
            self._chunks.extend(self._allocated(chunks))
        return [self._chunks[i][start : start + size] for (i, start), size in zip(places, sizes, strict=True)]

    def _allocated(self, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        is_pinned = self.pinned
        for i, size in enumerate(sizes):
            if is_pinned:
                try:
                    yield torch.empty(size, dtype=torch.uint8, pin_memory=True)
                    continue
                except RuntimeError as error:  # the driver's, which is no OutOfMemoryError
                    is_pinned = False
                    self._check_room(sum(sizes[i:]), error)
            try:
                yield torch.empty(size, dtype=torch.uint8)
            except RuntimeError as error:
                raise MemoryError(str(error)) from error

    def _check_room(self, num_bytes: int, error: RuntimeError) -> None:
        # Ordinary memory is promised before it is there: the process would be killed when it is written to.
        if num_bytes > psutil.virtual_memory().available:
            raise MemoryError(str(error)) from error
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%.0f MiB of host memory can't be pinned (%s): a checkpoint is copied to ordinary memory, which takes "
                "longer.",
                *(num_bytes / 2**20, str(error).partition("\n")[0]),
            )


def plan(sizes: Sequence[int], *, rounded: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """
    Return the sizes of chunks that hold blocks of these sizes, and the chunk and the offset of each block.

    One chunk; if `rounded`, chunks of sizes that are powers of two: each the largest one that can be filled, but large
    enough for the largest block.
    """
    chunks: list[int] = []
    places = [(0, 0)] * len(sizes)
    left = sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True)
    while left:
        total = sum(map(_aligned, (sizes[i] for i in left)))
        chunk, end, rest = _chunk_size(total, _aligned(sizes[left[0]])) if rounded else total, 0, []
        for i in left:
            if end + _aligned(sizes[i]) > chunk:
                rest.append(i)
                continue
            places[i] = (len(chunks), end)
            end += _aligned(sizes[i])
        chunks.append(chunk)
        left = rest
    return chunks, places


def _chunk_size(total: int, largest: int) -> int:
    if total <= SMALL_CHUNK:
        return 1 << (total - 1).bit_length()
    return max(1 << (total.bit_length() - 1), 1 << (largest - 1).bit_length())


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def emptied(state: Any) -> Any:
    """Return a nested state with an empty tensor of its type in place of each tensor."""
    if isinstance(state, torch.Tensor):
        return torch.empty(0, dtype=state.dtype)
    if isinstance(state, dict):
        same_type = copy.copy(state)
        same_type.update({name: emptied(each) for name, each in state.items()})
        return same_type
    return type(state)(emptied(each) for each in state) if type(state) in (list, tuple) else state


def _key(tensor: torch.Tensor) -> Key:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _has_storage(tensor: torch.Tensor) -> bool:
    # Quantized, sparse and empty tensors are few and small.
    return type(tensor) is torch.Tensor and tensor.layout == torch.strided and tensor.untyped_storage().nbytes() > 0


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a nested state, without their gradients' history."""
    if isinstance(value, torch.Tensor):
        yield value.detach()
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif type(value) in (list, tuple):
        for each in value:
            yield from _tensors(each)


def _rebuilt(value: Any, copied: Mapping[Key, Storage]) -> Any:
    """Return a nested state with its tensors in the copied storages."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        if not _has_storage(tensor):
            return tensor.cpu().clone()
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(copied[_key(tensor)], tensor.storage_offset(), tensor.size(), tensor.stride())
    if isinstance(value, dict):
        same_type = copy.copy(value)  # an OrderedDict, with its attributes
        same_type.update({name: _rebuilt(each, copied) for name, each in value.items()})
        return same_type
    if type(value) in (list, tuple):
        return type(value)(_rebuilt(each, copied) for each in value)
    return copy.deepcopy(value)
