"""Whole weights in a folder that `from_pretrained` loads, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from harness.adapters import is_adapted, load_tensors, tensors_of, write_adapter
from harness.config import ConfigError


def save_model(
    model: torch.nn.Module,
    processing_class: Any,
    folder: Path,
    *,
    as_published: bool,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> list[Path]:
    """
    Write weights, config and processing class as the Trainer writes them; returns their files. Call it on one rank.

    `as_published` gives weights the names that the architecture has on the Hub, where these differ from the model's
    own (mixtures of experts, multimodal models); a checkpoint keeps the model's own, to be loaded into it again.
    `from_pretrained` reads both. `weights`, as `saved_weights` gives them, are written in place of the model's own.
    Of a model with an adapter the adapter alone is written.

    A model that is no PreTrainedModel has its state dict in model.safetensors; tied tensors are written once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the folder's other files: what is there afterwards is the model, and nothing of it is half-written.
    partial = folder / "model.partial"
    if partial.exists():
        shutil.rmtree(partial)
    weights = saved_weights(model) if weights is None else weights
    _write_model(model, weights, processing_class, partial, as_published=as_published)
    files = []
    for path in sorted(partial.rglob("*")):
        final = folder / path.relative_to(partial)
        if path.is_dir():
            final.mkdir(exist_ok=True)
        else:
            path.replace(final)
            files.append(final)
    shutil.rmtree(partial)
    return files


def saved_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is saved of an unwrapped model: its state dict, or its adapter alone."""
    return tensors_of(model) if is_adapted(model) else model.state_dict()


def _write_model(
    model: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    processing_class: Any,
    folder: Path,
    *,
    as_published: bool,
) -> None:
    folder.mkdir()
    if is_adapted(model):
        # A checkpoint has peft's card, as the Trainer's has; beside the published model stands the run's own.
        write_adapter(model, weights, folder, with_card=not as_published)
    elif isinstance(model, PreTrainedModel):
        shows_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # a bar for each save would break up the training's own
        model.save_pretrained(folder, state_dict=dict(weights), save_original_format=as_published)
        if shows_bars:
            logging.enable_progress_bar()
    else:
        seen: set[int] = set()
        tensors = {
            name: tensor.contiguous()
            for name, tensor in weights.items()
            if not (tensor.data_ptr() in seen or seen.add(tensor.data_ptr()))  # type: ignore[func-returns-value]
        }
        save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    if hasattr(processing_class, "save_pretrained"):
        processing_class.save_pretrained(folder)


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """
    Load safetensors, whole or in shards, into a model that is not wrapped yet; into its adapter, if it has one.

    Raises ConfigError if they belong to another model or can't be read.
    """
    adapted = is_adapted(model)
    if adapted != (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        has = "an adapter alone, and the whole model is trained: give the --lora_* flags, --peft_config or the adapter"
        raise ConfigError(
            f"{folder} holds {'a whole model, and an adapter is trained: leave its flags out' if adapted else has}"
            ", as when it was saved."
        )
    tensors = _read(folder, [ADAPTER_SAFE_WEIGHTS_NAME] if adapted else None)
    own = tensors_of(model) if adapted else model.state_dict(keep_vars=True)
    unexpected = sorted(set(tensors) - set(own))
    # Of tied tensors one name is saved; the others share its storage and are loaded with it.
    loaded = {own[name].data_ptr() for name in tensors if name in own}
    missing = sorted(name for name, tensor in own.items() if name not in tensors and tensor.data_ptr() not in loaded)
    misshapen = sorted(name for name in tensors if name in own and tensors[name].shape != own[name].shape)
    if unexpected or missing or misshapen:
        first = (unexpected + missing + misshapen)[0]
        raise ConfigError(
            f"{folder} is of another model: {len(unexpected)} weights are unknown, {len(missing)} are missing, "
            f"{len(misshapen)} have another shape (the first: {first}). Use the model it was saved from."
        )
    if adapted:
        load_tensors(model, tensors)
    else:
        model.load_state_dict(tensors, strict=False)


def _read(folder: Path, files: list[str] | None) -> dict[str, torch.Tensor]:
    """The tensors of these files, or of all that the index names. Raises ConfigError."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    tensors: dict[str, torch.Tensor] = {}
    try:
        if files is None and index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in files or [SAFE_WEIGHTS_NAME]:
            tensors |= load_file(folder / name)
    except Exception as error:  # safetensors raises its own type, which it does not export
        raise ConfigError(f"The weights in {folder} can't be read: {error}") from error
    return tensors
