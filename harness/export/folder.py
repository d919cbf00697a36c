"""Export a checkpoint as a folder that `from_pretrained` loads, written shard by shard."""

from __future__ import annotations

import fcntl
import glob
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import CHAT_TEMPLATE_DIR, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from harness.checkpoint.layout import why_damaged
from harness.errors import ConfigError
from harness.export.sources import Weight, is_adapter, read_weights
from harness.files import follow_umask, sync
from harness.model.adapters import merged_model

logger = logging.getLogger(__name__)

FILES_PATTERN = "model{suffix}.safetensors"
# A processing class may have files of any name, so the training's own files, which have known names, are left out.
KEPT = re.compile(r".*\.(json|jinja|txt|model|tiktoken|bpe)")
OF_THE_TRAINING = re.compile(
    r"(adapter_|model_)?config\.json|.*\.safetensors\.index\.json|(trainer|harness)_state\.json|wandb_run\.json"
    r"|(all|train|eval|test|predict)\w*_results\.(json|txt)"
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export: the weights' files, their size in bytes, and the type of floating-point weights."""

    num_files: int
    num_bytes: int
    dtype: str


def export(checkpoint: Path, out: Path, *, max_shard_size: str, dtype: torch.dtype | None) -> Exported:
    """
    Write a checkpoint's model to `out`, with the weight names of its architecture on the Hub, as `dtype` or as it is.

    Only one shard at a time is in memory, with two exceptions: an adapter is merged into its model in memory, and where
    the architecture's weights on the Hub are split otherwise (mixtures of experts) all of those are mapped at once.
    `out` is written whole or not at all. Raises ConfigError.
    """
    out = out.absolute()
    _check(checkpoint, out)
    model, weights = model_and_weights(checkpoint)
    weights = published(model, weights, checkpoint)
    if dtype is not None:
        weights = {name: _cast(weight, dtype) for name, weight in weights.items()}
    needed = sum(_blank(weight).nbytes for weight in weights.values())
    free = shutil.disk_usage(next(path for path in out.parents if path.exists())).free
    if needed > free:
        raise ConfigError(f"OUT={out}: no space, {needed:,} bytes are needed and {free:,} free; choose another disk.")
    try:
        with _partial_folder(out) as partial:
            exported = _write(model, weights, checkpoint, partial, max_shard_size)
            follow_umask(partial)
            for path in (*partial.iterdir(), partial):
                sync(path)
            partial.rename(out)
            sync(out.parent)
    except Exception as error:  # safetensors raises its own type for a full disk, which it does not export
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"OUT={out} can't be written: {type(error).__name__} {error}.") from error
    return exported


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """
    Yield a new folder beside `out`; what is left of it at the end is removed, and what killed exports have left.

    A file lock, which the system releases at a process's death, tells those from exports that are running.
    """
    for left in out.parent.glob(f"{glob.escape(out.name)}.*.partial"):
        with _locked(left) as is_left:
            if is_left:
                logger.info("Removed the leftover of a killed export: %s.", left)
                shutil.rmtree(left, ignore_errors=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        with _locked(partial):
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock on a folder, and yield whether it could be taken: not where the file system has none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        is_held = False
    else:
        is_held = True
    try:
        yield is_held
    finally:
        os.close(descriptor)


def model_and_weights(checkpoint: Path) -> tuple[PreTrainedModel, dict[str, Weight]]:
    """
    Return a model without weights, for its config and names, and the weights, with an adapter merged in.

    Raises ConfigError.
    """
    if not is_adapter(checkpoint):
        weights = read_weights(checkpoint)
        return blank_model(checkpoint), weights
    model = merged_model(checkpoint)
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"{checkpoint}: its adapter belongs to a {type(model).__name__}, which is none of Transformers'."
        )
    first = {tensor.data_ptr(): name for name, tensor in reversed(model.state_dict().items())}  # of tied weights
    kept = {name: tensor for name, tensor in model.state_dict().items() if first[tensor.data_ptr()] == name}
    return model, {name: _held(tensor) for name, tensor in kept.items()}


def blank_model(checkpoint: Path) -> PreTrainedModel:
    """Return the model of a checkpoint without memory for its weights. Raises ConfigError."""
    file = checkpoint / CONFIG_NAME
    if not file.is_file():
        raise ConfigError(
            f"{checkpoint} holds no {CONFIG_NAME}, so nothing says which model it is; copy that of the model there. "
            "A model that is none of Transformers' has none, and from_pretrained can't load it."
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        (name,) = config.architectures or ["None"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{file} can't be read: {reason}") from error
    architecture = getattr(transformers, name, None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
        raise ConfigError(
            f"{file} names the architecture {name}, which this version of Transformers ({transformers.__version__}) "
            "does not have; install one that has it, or correct `architectures`."
        )
    with torch.device("meta"):
        model: PreTrainedModel = architecture(config)
    model.tie_weights()
    return model


def published(model: PreTrainedModel, weights: dict[str, Weight], checkpoint: Path) -> dict[str, Weight]:
    """
    Return the weights under the names that the architecture has on the Hub.

    Raises ConfigError if they do not belong to the model, neither by these names nor by its own.
    """
    own = model.state_dict(keep_vars=True)
    if not set(weights) <= set(own):
        # A final model has the names of the Hub already.
        of_hub = revert_weight_conversion(model, dict(model.state_dict()))
        if set(weights) <= set(of_hub) and _fits(weights, of_hub):
            return weights
        own = own if len(set(weights) - set(own)) <= len(set(weights) - set(of_hub)) else of_hub
    _check_fit(weights, own, checkpoint)
    own_blank = {name: _blank(weight) for name, weight in weights.items()}
    renamed = revert_weight_conversion(model, dict(own_blank))
    names = {id(tensor): name for name, tensor in own_blank.items()}
    if all(id(tensor) in names for tensor in renamed.values()):
        return {name: weights[names[id(tensor)]] for name, tensor in renamed.items()}
    cut = revert_weight_conversion(model, {name: weight.read() for name, weight in weights.items()})
    return {name: _held(tensor) for name, tensor in cut.items()}


def _check(checkpoint: Path, out: Path) -> None:
    if not checkpoint.is_dir():
        raise ConfigError(f"CHECKPOINT={checkpoint}: no such folder; give a checkpoint-N of a training.")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"OUT={out} exists and is not empty; choose another folder, or delete it.")
    if (fault := why_damaged(checkpoint)) is not None:
        raise ConfigError(f"CHECKPOINT={checkpoint}: {fault}. Use another checkpoint.")


def _fits(weights: Mapping[str, Weight], own: Mapping[str, torch.Tensor]) -> bool:
    return all(weight.shape == tuple(own[name].shape) for name, weight in weights.items())


def _check_fit(weights: Mapping[str, Weight], own: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    unknown = sorted(set(weights) - set(own))
    # Only one of several tied weights is saved.
    there = {id(own[name]) for name in weights if name in own}
    missing = sorted(name for name, tensor in own.items() if id(tensor) not in there)
    misshapen = sorted(n for n, weight in weights.items() if n in own and weight.shape != tuple(own[n].shape))
    if unknown or missing or misshapen:
        raise ConfigError(
            f"{checkpoint}: the weights are not those of its {CONFIG_NAME}: {len(unknown)} are unknown, "
            f"{len(missing)} missing, {len(misshapen)} of another shape (the first: "
            f"{(unknown + missing + misshapen)[0]}). Put the {CONFIG_NAME} there that they were trained with."
        )


def _write(
    model: PreTrainedModel, weights: Mapping[str, Weight], checkpoint: Path, folder: Path, max_shard_size: str
) -> Exported:
    split = split_torch_state_dict_into_shards(
        {name: _blank(weight) for name, weight in weights.items()},
        filename_pattern=FILES_PATTERN,
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights[name].read().contiguous() for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        total = sum(_blank(weight).numel() for weight in weights.values())
        index: dict[str, Any] = {
            "metadata": {"total_parameters": total, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
    dtypes = [weight.dtype for weight in weights.values() if weight.dtype.is_floating_point]
    model.config.dtype = max(dtypes, key=dtypes.count)
    model.config.save_pretrained(folder)
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and KEPT.fullmatch(path.name) and not OF_THE_TRAINING.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
    if (checkpoint / CHAT_TEMPLATE_DIR).is_dir():
        shutil.copytree(checkpoint / CHAT_TEMPLATE_DIR, folder / CHAT_TEMPLATE_DIR)
    num_bytes = sum((folder / file).stat().st_size for file in split.filename_to_tensors)
    dtype = str(model.config.dtype).removeprefix("torch.")
    return Exported(num_files=len(split.filename_to_tensors), num_bytes=num_bytes, dtype=dtype)


def _blank(weight: Weight) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")


def _cast(weight: Weight, dtype: torch.dtype) -> Weight:
    if not weight.dtype.is_floating_point:
        return weight
    return Weight(shape=weight.shape, dtype=dtype, read=lambda: weight.read().to(dtype))


def _held(tensor: torch.Tensor) -> Weight:
    return Weight(shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor)
