"""
Count host syncs, the moments when the host waits for a value of the device, and collectives.

`python -m tests.support.measuring.syncs FILE FLAG...` trains with the flags, also under a launcher; rank zero writes
to FILE how many collectives its reports were.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.train import main

ROOT = Path(__file__).parents[3]
# Of torch's, what keeps tensors in host memory on any device: counts of steps, seeds and indices of samples.
ON_HOST = ("torch/optim/", "torch/utils/data/")
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


@dataclass(frozen=True)
class Event:
    """What happened, and where: the functions that were running as (file, name), the outermost first."""

    name: str
    frames: tuple[tuple[str, str], ...]

    def within(self, function: str) -> bool:
        """Whether it happened in this function of the loop."""
        return ("harness/loop.py", function) in self.frames

    @property
    def place(self) -> str:
        """The innermost function outside of torch."""
        file, function = next(frame for frame in reversed(self.frames) if not frame[0].startswith("torch/"))
        return f"{file}: {function}"


def seen_now(name: str) -> Event:
    frames: list[tuple[str, str]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__:
            short = file.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]
            frames.insert(0, (short, frame.f_code.co_name))
        frame = frame.f_back
    return Event(name, tuple(frames))


class Dispatched(TorchDispatchMode):
    """Calls `told` with each operation of torch's."""

    def __init__(self, told: Callable[[Any], None]) -> None:
        super().__init__()
        self.told = told

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.told(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def syncs(device: str) -> Iterator[list[Event]]:
    """
    Yield a list that gets each host sync of the block.

    On CUDA those that torch tells. On the CPU the calls that would be one there: scalars that are read (`item`, `bool`,
    ...), `nonzero`, `tolist`, `numpy`, `cpu`, and `to("cpu")`; a device that is given as an object may be the model's.
    """
    found: list[Event] = []
    with _told(found) if device == "cuda" else _called(found):
        yield found


@contextmanager
def _told(found: list[Event]) -> Iterator[None]:
    def show(message: Warning | str, *given: Any) -> None:
        if "synchronizing" in str(message):
            found.append(seen_now(str(message)))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _called(found: list[Event]) -> Iterator[None]:
    def note(name: str) -> None:
        event = seen_now(name)
        if not any(file.startswith(ON_HOST) for file, _ in event.frames):
            found.append(event)

    def reading(name: str) -> Callable[..., Any]:
        real = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *given: Any, **options: Any) -> Any:
            note(name)
            return real(tensor, *given, **options)

        return read

    move = torch.Tensor.to

    def moved(tensor: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        if "cpu" in (*(each for each in given if isinstance(each, str)), options.get("device")):
            note("to")
        return move(tensor, *given, **options)

    with (
        patch.object(torch.Tensor, "tolist", reading("tolist")),
        patch.object(torch.Tensor, "numpy", reading("numpy")),
        patch.object(torch.Tensor, "cpu", reading("cpu")),
        patch.object(torch.Tensor, "to", moved),
        Dispatched(lambda operation: note(str(operation)) if operation in READS else None),
    ):
        yield


@contextmanager
def collectives() -> Iterator[list[Event]]:
    """Yield a list that gets each collective of torch.distributed in the block."""
    found: list[Event] = []

    def note(operation: Any) -> None:
        if operation.namespace == "c10d":
            found.append(seen_now(str(operation)))

    with Dispatched(note):
        yield found


if __name__ == "__main__":
    with collectives() as found:
        code = main(sys.argv[2:])
    if os.environ["RANK"] == "0":  # the run has put accelerate's state back
        Path(sys.argv[1]).write_text(f"{sum(each.within('report') for each in found)}")
    sys.exit(code)
