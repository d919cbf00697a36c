"""Reading torch's files without running what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from harness.errors import ConfigError


def load_safely(path: str | Path, map_location: Any, allowed: Sequence[Any], *, mmap: bool = False) -> Any:
    """
    Local: tensors, plain values and objects of the `allowed` classes; with `mmap` tensors are read when they are used.

    Raises ConfigError if the file holds anything else or can't be read.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises several types for a file that is cut, damaged or crafted
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} can't be loaded safely: {reason}") from error
