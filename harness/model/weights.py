"""Write whole weights to a folder that `from_pretrained` loads, and load them again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    logging,
)

from harness.distributed.sharding import fill, is_part, whole_shape
from harness.errors import ConfigError
from harness.files import follow_umask, write_json
from harness.masking import masked
from harness.model.adapters import is_adapted, load_tensors, tensors_of, write_adapter

# As safetensors names them.
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def own_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """
    Local: return the unwrapped model's weights to save: its state dict, or only those of its adapter.

    They are as this rank has them: `Backend.whole` makes whole ones of them. Raises ConfigError for a state dict that
    holds anything else.
    """
    own: dict[str, Any] = tensors_of(model) if is_adapted(model) else model.state_dict(keep_vars=True)
    for name, value in own.items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"The state dict of {type(model).__name__} holds {name}, a {type(value).__name__}, and a checkpoint "
                "keeps tensors only: register a buffer in its place, or leave it out of the state dict."
            )
    return own


def raw_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """
    Local: return what `own_weights` does, without the model's own `state_dict`, which may raise.

    Of a model with an adapter only what is trained. For the last resort of a save that fails.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    adapted = is_adapted(model)
    return {name: tensor for name, tensor in named if tensor.requires_grad or not adapted}


def stand_ins(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """
    Local: return tensors to try a save with, and the bytes that the real ones take on the disk.

    They have the names, types and ties of the weights, and next to no size. Weights that are different views of one
    memory keep their sizes, and what is no ordinary tensor is the tensor itself. Raises ConfigError.
    """
    own = own_weights(model)
    views: dict[int, set[tuple[Any, ...]]] = {}
    for tensor in filter(_is_plain, own.values()):
        views.setdefault(_memory(tensor), set()).add(_view(tensor))
    memories: dict[int, torch.Tensor] = {}
    made: dict[Any, torch.Tensor] = {}
    found, sizes = {}, {}
    for name, tensor in own.items():
        key = _view(tensor) if _is_plain(tensor) else id(tensor)
        if key not in made and _is_plain(tensor) and len(views[_memory(tensor)]) > 1:
            made[key] = _view_in(memories.setdefault(_memory(tensor), _of_size(tensor)), tensor)
        elif key not in made:
            made[key] = _small(tensor) if _is_plain(tensor) or is_part(tensor) else tensor.detach()
        found[name], sizes[key] = made[key], whole_shape(tensor).numel() * tensor.element_size()
    return found, sum(sizes.values())


def _small(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros([min(size, 1) for size in whole_shape(tensor)], dtype=tensor.dtype)


def _of_size(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.uint8)


def _view_in(memory: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def trained_bytes(model: torch.nn.Module) -> int:
    """Return the size in bytes of the parameters that are trained, whole."""
    return sum(whole_shape(each).numel() * each.element_size() for each in model.parameters() if each.requires_grad)


def check_published(model: torch.nn.Module) -> None:
    """Try, without any bytes, to give the weights the names of the Hub. Raises what transformers raises."""
    if isinstance(model, PreTrainedModel):
        meta = {
            name: torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")
            for name, tensor in model.state_dict(keep_vars=True).items()
        }
        revert_weight_conversion(model, meta)


@contextmanager
def config_kept(model: torch.nn.Module) -> Iterator[None]:
    """Put the model's config back at the end of the block: transformers writes into it when it saves."""
    configs = [getattr(model, name) for name in ("config", "generation_config") if hasattr(model, name)]
    before = [(config, dict(vars(config))) for config in configs if hasattr(config, "__dict__")]
    try:
        yield
    finally:
        for config, values in before:
            vars(config).clear()
            vars(config).update(values)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it has memory of its own, or a view of some: no subclass, neither sparse nor sharded nor empty."""
    is_ordinary = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return is_ordinary and not is_part(tensor) and tensor.numel() > 0


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _apart(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each weight once, as safetensors takes it: tied ones by their first name, views of one memory copied."""
    kept = {_view(tensor) if _is_plain(tensor) else name: name for name, tensor in reversed(list(weights.items()))}
    names = set(kept.values())
    count = Counter(_memory(weights[name]) for name in names if _is_plain(weights[name]))
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        if _is_plain(tensor) and count[_memory(tensor)] > 1
        else tensor.contiguous()
        for name, tensor in weights.items()
        if name in names
    }


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
    `from_pretrained` reads both. `weights`, whole ones, are written instead of the model's own state dict. Of
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
        weights = {name: tensor.detach() for name, tensor in own_weights(model).items()}
    _write_model(model, weights, processing_class, partial, as_published=as_published)
    follow_umask(partial)
    _hide_secrets(partial / CONFIG_NAME)
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


def _hide_secrets(path: Path) -> None:
    """Mask what a task has put into its model's configuration: checkpoints are published."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (hidden := masked(content)) != content:
        write_json(path, hidden)


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
        save_file(_apart(weights), folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    save_processing(processing_class, folder)


def save_processing(processing_class: Any, folder: Path) -> None:
    """Write a tokenizer or another processing class, if it can be written."""
    if hasattr(processing_class, "save_pretrained"):
        processing_class.save_pretrained(folder)


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """
    Collective: load safetensors, whole or in several files, file by file into a model that is not wrapped.

    Of a model with an adapter only the adapter is loaded. Raises ConfigError if they belong to another model or can't
    be read.
    """
    _check_and_load(model, folder, loads=True)


def check_weights(model: torch.nn.Module, folder: Path) -> None:
    """Local: raise ConfigError if `load_weights` would, as far as names and shapes say."""
    _check_and_load(model, folder, loads=False)


def _check_and_load(model: torch.nn.Module, folder: Path, *, loads: bool) -> None:
    adapted = is_adapted(model)
    if adapted != (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        has = "an adapter alone, and the whole model is trained: give the --lora_* flags, --peft_config or the adapter"
        raise ConfigError(
            f"{folder} holds {'a whole model, and an adapter is trained: leave its flags out' if adapted else has}"
            ", as when it was saved."
        )
    try:
        files = weights_files(folder)
        own = own_weights(model)
        _check_fit(own, [folder / name for name in files], folder)
        for name in files if loads else ():
            _load(model, own, folder / name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"The weights in {folder} can't be read: {error}") from error


def weights_files(folder: Path) -> list[str]:
    """
    Return the names of the files with the weights of a folder: an adapter's, those of an index, or the one.

    Raises ConfigError for an index that can't be read, or names a file that is not in the folder.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        names = (ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME)
        return [name for name in names if (folder / name).is_file()][:1]
    try:
        files = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index.name} can't be read: {type(error).__name__} {error}") from error
    for name in files:
        if not is_inside(name) or not (folder / name).is_file():
            raise ConfigError(f"{index.name} names {name!r}, which is no file in the folder")
    return files


def is_inside(name: str) -> bool:
    """Whether the name of a file that a file gives leads to a place in its folder."""
    path = Path(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def check_safetensors(file: Path) -> None:
    """Raise ConfigError for a file that is cut, or whose header does not describe it. Reads no tensor."""
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{file.name} can't be read: {error}") from error


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
    types: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            shapes |= {name: tuple(each.get_shape()) for name, each in slices.items()}
            types |= {name: each.get_dtype() for name, each in slices.items()}
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
    if strange := [name for name, saved in types.items() if not _is_of_a_kind(own[name].dtype, saved)]:
        what, dtype = types[strange[0]], own[strange[0]].dtype
        raise ConfigError(f"{folder} holds {what} as {strange[0]}, where the model has {dtype}.")


def _is_of_a_kind(dtype: torch.dtype, saved: str) -> bool:
    """Whether weights may be read as `dtype`: the precision may differ, the two kinds of 16 bits are not mixed up."""
    own, floats = FLOATS.get(dtype), FLOATS.values()
    if own is None or saved not in floats:
        return own is None and saved not in floats
    return {own, saved} != {"F16", "BF16"}


def _storage(tensor: torch.Tensor) -> int:
    return id(tensor) if is_part(tensor) else tensor.data_ptr()
