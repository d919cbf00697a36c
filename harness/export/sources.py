"""Read a checkpoint's weights lazily, each from its file when it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from harness.errors import ConfigError
from harness.export.shards import find_shards, read_shards

FSDP_FOLDERS = "pytorch_model_fsdp*"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor that is not in memory: each call of `read` returns it, on the CPU."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a peft adapter, and no weights of its model."""
    whole = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    return (folder / ADAPTER_CONFIG_NAME).is_file() and not any((folder / name).is_file() for name in whole)


def read_weights(folder: Path) -> dict[str, Weight]:
    """
    Return the weights in a folder by name: safetensors, whole or in shards, or else DeepSpeed's.

    Raises ConfigError if there are none, or if they can't be read.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return _indexed(index)
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return _of_file(folder / SAFE_WEIGHTS_NAME)
    if (shards := find_shards(folder)) is not None:
        return {
            name: Weight(shape=tuple(shape), dtype=dtype, read=read)
            for name, (shape, dtype, read) in read_shards(shards).items()
        }
    if (sharded := next(folder.glob(FSDP_FOLDERS), None)) is not None:
        raise ConfigError(
            f"{folder} holds FSDP's shards ({sharded.name}), whose index is a pickle, which could run code. If you "
            f"trust it: accelerate merge-weights {sharded} {folder} writes {SAFE_WEIGHTS_NAME}; then export again."
        )
    raise ConfigError(f"{folder} holds no weights ({SAFE_WEIGHTS_NAME}), so it is no checkpoint; give a checkpoint-N.")


def _indexed(index: Path) -> dict[str, Weight]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: _of_file(index.with_name(name)) for name in sorted(set(places.values()))}
        return {name: files[file][name] for name, file in places.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{index} can't be read, or names weights that are not there: {error}.") from error


def _of_file(path: Path) -> dict[str, Weight]:
    try:
        with safe_open(path, "pt") as file:
            # A slice gives shape and type without being read.
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return {
                name: Weight(
                    shape=tuple(of_name.get_shape()),
                    dtype=of_name[:0].dtype if of_name.get_shape() else file.get_tensor(name).dtype,
                    read=partial(_tensor, path, name),
                )
                for name, of_name in slices.items()
            }
    except Exception as error:  # safetensors raises its own type, which it does not export
        raise ConfigError(f"{path} can't be read: {error}.") from error


def _tensor(path: Path, name: str) -> torch.Tensor:
    # Mapped anew for each, so that the memory of what was read is freed with its tensor.
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor
