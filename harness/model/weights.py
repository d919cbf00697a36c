"""Write whole weights to a folder that `from_pretrained` loads, and load them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from harness.distributed.backend import Backend
from harness.distributed.sharding import fill, is_part, whole_shape
from harness.errors import ConfigError
from harness.model.adapters import is_adapted, load_tensors, tensors_of, write_adapter


def whole_weights(model: torch.nn.Module, backend: Backend) -> dict[str, torch.Tensor]:
    """
    Collective: return the unwrapped model's weights to save: its state dict, or only those of its adapter.

    If it is sharded, rank zero gets copies in host memory and the other ranks {}.
    """
    return backend.whole(_own(model))


def _own(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers to save, by their names in the files."""
    return tensors_of(model) if is_adapted(model) else model.state_dict(keep_vars=True)


def save_model(
    model: torch.nn.Module,
    processing_class: Any,
    folder: Path,
    *,
    as_published: bool,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> list[Path]:
    """
    Write weights, config and processing class as the Trainer does; returns their files. Call it on one rank.

    `as_published` gives weights the names that the architecture has on the Hub, where these differ from the model's own
    (mixtures of experts, multimodal models); a checkpoint keeps the model's own, to be loaded into it again.
    `from_pretrained` reads both. `weights`, from `whole_weights`, are written instead of the model's own state dict. Of
    a model with an adapter only the adapter is written, as peft does.

    For a model that is no PreTrainedModel the state dict is written to model.safetensors; tied tensors are written
    once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Written to a temporary folder first, then renamed file by file: no file of the model is half-written.
    partial = folder / "model.partial"
    if partial.exists():
        shutil.rmtree(partial)
    if weights is None:
        weights = {name: tensor.detach() for name, tensor in _own(model).items()}
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
        # A checkpoint has peft's card, as the Trainer's has; the published model gets the run's own card.
        write_adapter(model, weights, folder, with_card=not as_published)
    elif isinstance(model, PreTrainedModel):
        shows_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # a bar for each save would disturb the training's bar
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
    Collective: load safetensors, whole or in several files, file by file into a model that is not wrapped.

    Of a model with an adapter only the adapter is loaded. Raises ConfigError if they belong to another model or can't
    be read.
    """
    adapted = is_adapted(model)
    if adapted != (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        has = "an adapter alone, and the whole model is trained: give the --lora_* flags, --peft_config or the adapter"
        raise ConfigError(
            f"{folder} holds {'a whole model, and an adapter is trained: leave its flags out' if adapted else has}"
            ", as when it was saved."
        )
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    try:
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            files = [ADAPTER_SAFE_WEIGHTS_NAME if adapted else SAFE_WEIGHTS_NAME]
        own = _own(model)
        _check_fit(own, [folder / name for name in files], folder)
        for name in files:
            _load(model, own, folder / name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"The weights in {folder} can't be read: {error}") from error


def _load(model: torch.nn.Module, own: Mapping[str, torch.Tensor], file: Path) -> None:
    with safe_open(file, framework="pt") as tensors, torch.no_grad():
        names = list(tensors.keys())
        whole = {name: tensors.get_tensor(name) for name in names if not is_part(own[name])}
        if is_adapted(model):
            load_tensors(model, whole)
        else:
            model.load_state_dict(whole, strict=False)
        for name in names:
            if is_part(own[name]):
                fill(own[name], tensors.get_slice(name))


def _check_fit(own: Mapping[str, torch.Tensor], files: Iterable[Path], folder: Path) -> None:
    """Raise ConfigError unless the weights are those of the model, by name and shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    unexpected = sorted(set(shapes) - set(own))
    # Tied tensors are saved under one name; the others share its storage and are loaded with it.
    loaded = {_storage(own[name]) for name in shapes if name in own}
    missing = sorted(name for name, tensor in own.items() if name not in shapes and _storage(tensor) not in loaded)
    misshapen = sorted(name for name in shapes if name in own and shapes[name] != tuple(whole_shape(own[name])))
    if unexpected or missing or misshapen:
        first = (unexpected + missing + misshapen)[0]
        raise ConfigError(
            f"{folder} is of another model: {len(unexpected)} weights are unknown, {len(missing)} are missing, "
            f"{len(misshapen)} have another shape (the first: {first}). Use the model it was saved from."
        )


def _storage(tensor: torch.Tensor) -> int:
    return id(tensor) if is_part(tensor) else tensor.data_ptr()
