"""Saves that fail: they are tried before the first step, and later the last resort is the weights alone."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from harness.errors import ConfigError
from harness.files import written_whole

MOST_LETTERS = 600  # of another library's message


@dataclass(frozen=True)
class Trial:
    """What is tried, in words, and the function that writes it into a folder."""

    what: str
    act: Callable[[Path], object]

    def make(self, folder: Path) -> None:
        """Do it. Raises ConfigError for whatever it raises: that is what every save would end with."""
        try:
            self.act(folder)
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".")[:MOST_LETTERS]
            kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__} "
            raise ConfigError(f"{self.what} can't be saved, so no step is made: {kind}{reason}.") from error


def pickle(states: Mapping[str, Any]) -> None:
    """Try to write states with torch, into memory."""
    for state in states.values():
        torch.save(state, BytesIO())


def leave_weights(weights: Mapping[str, Any], output_dir: Path, *, step: int) -> str:
    """
    Local: write weights that could not be saved otherwise, and return a sentence that says where. Raises nothing.

    The file is a state dict that `torch.load(..., weights_only=True)` reads: no config, and no file format that refuses
    shared memory or unusual types. What is no tensor is left out. Where the folder of the run can't take it, it goes to
    the system's folder for temporary files.
    """
    reasons = []
    for is_elsewhere in (False, True):
        folder = Path(tempfile.mkdtemp(prefix="harness-weights-")) if is_elsewhere else output_dir
        path = folder.absolute() / f"weights-of-step-{step}.pt"
        try:
            tensors = _on_host(weights)
            _check_room(folder, tensors)
            with written_whole(path, durable=True) as partial:
                torch.save(tensors, partial)
        except Exception as error:  # torch has types of its own for a full disk; the error that led here must be told
            reasons.append(f"{folder}: {str(error).partition(chr(10))[0]}")
            if is_elsewhere:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            return (
                f"The weights of step {step} are in {path}: "
                f'model.load_state_dict(torch.load("{path}", weights_only=True))'
            )
    return f"The weights of step {step} could not be written either ({'; '.join(reasons)})"


def _check_room(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    needed = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}.values())
    if needed > (free := shutil.disk_usage(folder).free):
        raise OSError(f"{needed:,} bytes are needed and {free:,} free")


def _on_host(weights: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors in host memory; tied ones stay one."""
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    found = {}
    for name, tensor in weights.items():
        if isinstance(tensor, torch.Tensor):
            detached = tensor.detach()
            is_plain = detached.layout == torch.strided
            key = (detached.data_ptr(), detached.shape, detached.stride(), detached.dtype) if is_plain else (name,)
            found[name] = copies.setdefault(key, detached if detached.device.type == "cpu" else detached.cpu())
    return found
