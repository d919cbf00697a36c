"""Detect a changed data set: a digest of a few samples, cheap enough for each start."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from harness.training import rng

NUM_SAMPLES = 16


def digest_of_samples(dataset: Any) -> str | None:
    """
    Return 16 hexadecimal digits over samples spread evenly over the data, the first and the last included.

    Leaves the generators as they are. None if samples can't be compared: one can't be read, or differs at each reading.
    """
    size = len(dataset)
    indices = sorted({round(i * (size - 1) / (NUM_SAMPLES - 1)) for i in range(NUM_SAMPLES)}) if size else []
    digest, again = hashlib.sha256(), hashlib.sha256()
    try:
        # Samples that draw random numbers are then equal, and the run's generators are left as they are.
        with rng.seeded(0):
            for i in indices:
                _add(digest, dataset[i])
                if i == 0:
                    first = digest.hexdigest()
        with rng.seeded(0):
            for i in indices[:1]:
                _add(again, dataset[i])
    except Exception:  # a data set may raise anything; the training meets it, if it needs that sample
        return None
    return digest.hexdigest()[:16] if not indices or again.hexdigest() == first else None


def _add(digest: Any, value: Any) -> None:
    """Add a value of any type to the digest; of a type that shows no content only its name."""
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        _add(digest, value.tolist())
    elif isinstance(value, (np.ndarray, np.generic)):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            _add(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _add(digest, item)
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        digest.update(f"{value!r},".encode())
    elif hasattr(value, "tobytes"):  # an image
        digest.update(value.tobytes())
    else:
        digest.update(type(value).__qualname__.encode())
