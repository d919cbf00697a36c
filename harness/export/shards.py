"""Read float32 weights from DeepSpeed's shards, for checkpoints that have no other weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness.distributed.zero import LATEST_FILE, load_shard
from harness.errors import ConfigError

# The shape and type of a weight, and the function that reads it.
Read = tuple[tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]
FOLDERS = "global_step*"


def find_shards(folder: Path) -> Path | None:
    """Return the folder with DeepSpeed's shards in a checkpoint: the one that `latest` names, or the only one."""
    latest = folder / LATEST_FILE
    named = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    found = sorted(path for path in folder.glob(FOLDERS) if path.is_dir() and named in ("", path.name))
    return found[-1] if found else None


def read_shards(folder: Path) -> dict[str, Read]:
    """
    Return the weights of ZeRO-1, 2 or 3, as its optimizer has them, and the buffers.

    The layout is the one that deepspeed.utils.zero_to_fp32 reads, which would unpickle anything in the files. They are
    memory-mapped, so the system can drop what was read. Raises ConfigError.
    """
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{folder.parent} holds its weights in DeepSpeed's shards alone, which takes DeepSpeed to read: "
            "pip install 'deepspeed>=0.19'."
        ) from error
    modules = [_load(path) for path in _ranks(folder, "*_model_states.pt")]
    optimizers = [_load(path)["optimizer_state_dict"] for path in _ranks(folder, "*_optim_states.pt")]
    try:
        stage, count = optimizers[0]["zero_stage"], optimizers[0]["partition_count"]
        count = max(count) if isinstance(count, list) else count
        if count != len(optimizers):
            raise ConfigError(
                f"{folder} holds the shards of {len(optimizers)} processes, but {count} saved it; add the missing ones."
            )
        return (_partitioned if stage == 3 else _flat)(modules, optimizers)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder} is not as DeepSpeed's ZeRO writes it: {type(error).__name__} {error}.") from error


def _load(path: Path) -> Any:
    return load_shard(str(path), "cpu", mmap=True)


def _ranks(folder: Path, pattern: str) -> list[Path]:
    """Return one file a rank, in rank order. Raises ConfigError if there is none."""
    found = sorted(folder.glob(pattern), key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)])
    if not found:
        raise ConfigError(f"{folder} holds no {pattern}, so it is not whole.")
    return found


def _flat(modules: Sequence[dict[str, Any]], optimizers: Sequence[dict[str, Any]]) -> dict[str, Read]:
    """Read ZeRO-1 and 2: a group's weights are concatenated and split into equal parts, one a rank."""
    # The module's file has buffers and frozen weights in full, the other weights in its own precision.
    copies = set(modules[0]["shared_params"])
    found = {name: _of(tensor) for name, tensor in modules[0]["module"].items() if name not in copies}
    paddings = optimizers[0].get("param_alignment_paddings")
    for group, shapes in enumerate(modules[0]["param_shapes"]):
        parts = [optimizer["single_partition_of_fp32_groups"][group] for optimizer in optimizers]
        start = 0
        for number, (name, shape) in enumerate(shapes.items()):
            found[name] = tuple(shape), torch.float32, partial(_joined, parts, start, tuple(shape))
            start += math.prod(shape) + (paddings[group][number] if paddings else 0)
    return found


def _partitioned(modules: Sequence[dict[str, Any]], optimizers: Sequence[dict[str, Any]]) -> dict[str, Read]:
    """Read ZeRO-3: each weight is split into equal parts, one a rank; a rank's parts are concatenated."""
    buffers = set(modules[0]["buffer_names"])
    found = {name: _of(tensor) for name, tensor in modules[0]["module"].items() if name in buffers}
    for name, shape in (modules[0].get("frozen_param_shapes") or {}).items():
        parts = [module["frozen_param_fragments"][name] for module in modules]
        found[name] = tuple(shape), torch.float32, partial(_joined, parts, 0, tuple(shape))
    start = 0
    ranks = [optimizer["fp32_flat_groups"] for optimizer in optimizers]
    for name, shape in (pair for shapes in modules[0]["param_shapes"] for pair in shapes.items()):
        size = math.ceil(math.prod(shape) / len(ranks))
        found[name] = tuple(shape), torch.float32, partial(_gathered, ranks, start, size, tuple(shape))
        start += size
    return found


def _of(tensor: torch.Tensor) -> Read:
    # In float32 like the weights, as in DeepSpeed's own script.
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tuple(tensor.shape), dtype, partial(tensor.to, dtype)


def _joined(parts: Sequence[torch.Tensor], start: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the elements from `start` on of consecutive tensors, in a shape."""
    return torch.cat(list(_pieces(parts, start, start + math.prod(shape))))[: math.prod(shape)].view(shape).float()


def _gathered(ranks: Sequence[Sequence[torch.Tensor]], start: int, size: int, shape: tuple[int, ...]) -> torch.Tensor:
    pieces = [piece for parts in ranks for piece in _pieces(parts, start, start + size)]
    return torch.cat(pieces)[: math.prod(shape)].view(shape).float()


def _pieces(parts: Sequence[torch.Tensor], start: int, end: int) -> Iterator[torch.Tensor]:
    for part in parts:
        flat = part.reshape(-1)
        if start < len(flat) and end > 0:
            yield flat[max(start, 0) : end]
        start, end = start - len(flat), end - len(flat)
