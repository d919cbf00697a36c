"""
Write the large files of a checkpoint beside a training: hashed on the way, past the page cache, at a pace.

Read back for its digest and written through the page cache, a checkpoint takes the kernel two to four times as much of
a core. Where a training computes on all cores, each of its steps waits for the slowest of its threads, which is the one
that shares its core with the writer: there the writer has a lower priority, and rests most of the time, until somebody
waits for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch

from harness.files import digest_of, sync

CHUNK_BYTES = 4 << 20  # a multiple of any disk's blocks
SHARE = 0.3  # of a core, beside a training that computes on all of them
NICENESS = 5  # of the writer's thread there: the kernel then gives it a quarter of a core that both want
SLICE_SECONDS = 0.01  # of work between two rests: each rest ends with a wait for the interpreter
SMALL_BYTES = 16 << 20  # of weights that are written as the libraries write them
MOST_BYTES = 50 << 30  # of weights in one file, as in save_pretrained
PLAIN_TYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)

WriteModel = Callable[[Path, Mapping[str, torch.Tensor]], object]


def share_beside(device: torch.device, num_processes: int) -> float:
    """Return the share of a core that a writer may take beside a training in so many processes of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    is_full = device.type == "cpu" and torch.get_num_threads() * num_processes >= cores
    return SHARE if is_full else 1.0


class Pace:
    """
    How fast a thread works: a share of the time (1.0: without rests), until it is hurried. `begin` in that thread.

    - rested_seconds: how long it has rested.
    """

    def __init__(self, share: float = 1.0) -> None:
        self.share, self.rested_seconds = share, 0.0
        self._hurried = threading.Event()
        self._mark()

    def begin(self) -> None:
        """Count from now on what this thread works; unless it is to work all the time its priority is lowered."""
        if self.share < 1 and sys.platform == "linux":  # elsewhere a thread has no priority of its own
            thread = threading.get_native_id()
            with suppress(OSError):  # a sandbox that does not let one
                own = os.getpriority(os.PRIO_PROCESS, thread)
                os.setpriority(os.PRIO_PROCESS, thread, min(own + NICENESS, 19))
        self._mark()

    def hurry(self) -> None:
        """End the rest under way, if there is one, and rest no more. From any thread."""
        self._hurried.set()

    def rest(self) -> None:
        """Wait until the processor's time since the last rest is the share of the time that has gone by."""
        if self.share >= 1 or self._hurried.is_set():
            return
        worked, before = time.thread_time() - self._worked_from, time.monotonic()
        if worked < SLICE_SECONDS:
            return
        if (left := worked / self.share - (before - self._began)) > 0:
            self._hurried.wait(left)
            self.rested_seconds += time.monotonic() - before
        self._mark()

    def _mark(self) -> None:
        self._worked_from, self._began = time.thread_time(), time.monotonic()


class PacedFile:
    """
    A new file, written from its beginning, as torch.save writes one; on the disk and hashed when it is closed.

    It goes past the page cache where the file system takes that. `write` raises nothing, since torch would make errors
    of another type of it: `close` raises OSError for what it has met.

    - size: in bytes. sha256: the digest in hexadecimal digits. Both of what was given, once it is closed.
    """

    def __init__(self, path: Path, pace: Pace) -> None:
        self.size, self.sha256 = 0, ""
        self._pace = pace
        self._error: OSError | None = None
        self._descriptor, self._is_direct = _opened(path)
        self._digest, self._filled = hashlib.sha256(), 0
        self._chunk = mmap.mmap(-1, CHUNK_BYTES)  # begins at a page, as a direct write wants it
        self._view = memoryview(self._chunk)

    def __enter__(self) -> PacedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(is_whole=error is None)

    def write(self, data: Any) -> int:
        """Take bytes, or an array of bytes; returns their number. Does nothing once something has failed."""
        given = memoryview(data).cast("B")
        start, end = 0, len(given)
        while start < end and self._error is None and self._descriptor >= 0:
            count = min(end - start, CHUNK_BYTES - self._filled)
            self._view[self._filled : self._filled + count] = given[start : start + count]
            start, self._filled = start + count, self._filled + count
            if self._filled == CHUNK_BYTES:
                self._empty()
        return end

    def flush(self) -> None:
        """Do nothing: torch asks for it. What is left is written when the file is closed."""

    def close(self, *, is_whole: bool = True) -> None:
        """Write what is left and sync the file, if it `is_whole`. Raises OSError for what has failed by then."""
        if self._descriptor < 0:
            return
        try:
            if is_whole and self._error is None:
                self._empty()
            if is_whole and self._error is None:
                os.fsync(self._descriptor)
                self.sha256 = self._digest.hexdigest()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1
            self._view.release()
            self._chunk.close()
        if self._error is not None and is_whole:
            raise self._error

    def _empty(self) -> None:
        """Hash and write what the chunk holds."""
        full = self._view[: self._filled]
        self._digest.update(full)
        self.size, self._filled = self.size + self._filled, 0
        try:
            self._written(full)
        except OSError as error:
            self._error = error
        finally:
            full.release()
        self._pace.rest()

    def _written(self, data: memoryview) -> None:
        done = 0
        if self._is_direct and len(data) < CHUNK_BYTES:  # the end of the file, which need not fill a block
            self._turn_to_the_cache()
        while done < len(data):
            try:
                done += os.write(self._descriptor, data[done:])
            except OSError as error:
                if not (self._is_direct and error.errno == errno.EINVAL):
                    raise
                self._turn_to_the_cache()  # a file system that lets one open a file so, and not write

    def _turn_to_the_cache(self) -> None:
        import fcntl

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._is_direct = False


def _opened(path: Path) -> tuple[int, bool]:
    """Open a new or emptied file; returns its descriptor, and whether it goes past the page cache. Raises OSError."""
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    if hasattr(os, "O_DIRECT"):  # Linux
        try:
            return os.open(path, flags | os.O_DIRECT, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o666), False


class PacedFolder:
    """The folder of a checkpoint while it is written at a pace, with the facts of the files for the manifest."""

    def __init__(self, path: Path, pace: Pace) -> None:
        self.path, self._pace = path, pace
        self._known: dict[str, dict[str, Any]] = {}

    def save(self, name: str, state: Any) -> None:
        """Write a state as torch.save does. Raises OSError for what the disk refuses."""
        with PacedFile(self.path / name, self._pace) as file:
            torch.save(state, cast(IO[bytes], file))  # which writes and flushes alone
        self._known[name] = {"size": file.size, "sha256": file.sha256}

    def save_model(self, weights: Mapping[str, torch.Tensor], write_model: WriteModel) -> None:
        """
        Write weights by `write_model`, whose files also say what is written, and how, beside them.

        It is given stand-ins of one element, where that makes no difference; what it has made of them says which
        weights the file holds, and in which order. Their bytes are then written here.
        """
        stand_ins = _stand_ins(weights)
        if stand_ins is None:
            write_model(self.path, weights)
            return
        write_model(self.path, stand_ins)
        written = sorted(self.path.glob("*.safetensors"))
        header = _header(written[0]) if len(written) == 1 else {}
        if not _is_of(header, stand_ins):  # written by other means: of a quantized model, say
            write_model(self.path, weights)
            return
        with PacedFile(written[0], self._pace) as file:
            _write_tensors(file, header, weights)
        self._known[written[0].name] = {"size": file.size, "sha256": file.sha256}

    def facts(self) -> dict[str, dict[str, Any]]:
        """Sync all that is in the folder, and return size and digest of each file by its name. Raises OSError."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if name not in self._known:
                sync(path)
            if path.is_file():
                found[name] = self._known.get(name) or {
                    "size": path.stat().st_size,
                    "sha256": digest_of(path, between=self._pace.rest),
                }
        return found


def _stand_ins(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Return tensors of one element with names, types and ties of the weights; None where these don't say it all."""
    views: dict[int, tuple[Any, ...]] = {}
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    found = {}
    for name, tensor in weights.items():
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not is_plain or tensor.dtype not in PLAIN_TYPES or tensor.device.type != "cpu" or tensor.numel() == 0:
            return None
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if views.setdefault(tensor.untyped_storage().data_ptr(), view) != view:  # parts of one memory
            return None
        found[name] = made.setdefault(view, torch.zeros([1] * tensor.dim(), dtype=tensor.dtype))
    num_bytes = sum(math.prod(view[1]) * view[3].itemsize for view in made)
    return found if SMALL_BYTES <= num_bytes <= MOST_BYTES else None


def _header(file: Path) -> dict[str, Any]:
    """Return what a safetensors file says of its tensors, in their order."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    return header


def _is_of(header: Mapping[str, Any], stand_ins: Mapping[str, torch.Tensor]) -> bool:
    described = {name: each for name, each in header.items() if name != "__metadata__"}
    return bool(described) and all(
        name in stand_ins and each["shape"] == list(stand_ins[name].shape) for name, each in described.items()
    )


def _write_tensors(file: PacedFile, header: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Write the safetensors file that has the weights in place of the stand-ins of its header."""
    described, end = dict(header), 0
    for name, each in header.items():
        if name != "__metadata__":
            begin, end = end, end + weights[name].nbytes
            described[name] = {"dtype": each["dtype"], "shape": list(weights[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in described:
        if name != "__metadata__":
            file.write(weights[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy())
