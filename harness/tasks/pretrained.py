"""Load tokenizer or image processor, config and model from a folder or the Hub, or make them from scratch."""

from __future__ import annotations

import difflib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.utils.peft_utils import find_adapter_config_file

from harness.config import FALSE, TRUE
from harness.errors import ConfigError
from harness.model.adapters import MODEL_CONFIG_FILE, adapter_config, load_adapter, why_not_found
from harness.tasks.flags import TaskConfig

logger = logging.getLogger(__name__)

# What a config writes down and does not take, or takes from where it is loaded.
NOT_ARGUMENTS = ("model_type", "transformers_version", "_name_or_path", "_commit_hash")


def load_tokenizer(config: TaskConfig, **options: Any) -> Any:
    """Load the tokenizer of --tokenizer_name or of the model, with its own `options`. Raises ConfigError."""
    name = config.tokenizer_name or config.model_name_or_path
    base = _under_adapter(config)
    if name is not None and base is not config and not any(Path(name).glob("tokenizer*")):
        name = base.model_name_or_path  # the adapter was saved without a tokenizer
    flag = "tokenizer_name" if config.tokenizer_name else "model_name_or_path"
    if name is None:
        raise ConfigError("No tokenizer; give --tokenizer_name, or --model_name_or_path with a model that has one.")
    with _user_model(config, flag, name, "its tokenizer can't be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, **_hub(config), **options)
    # From a folder without tokenizer files, Transformers makes a tokenizer with special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(f"--{flag}={name} holds no tokenizer; name one by --tokenizer_name.")
    return tokenizer


def load_image_processor(config: TaskConfig) -> Any:
    """Load the image processor of --image_processor_name or of the model. Raises ConfigError."""
    name = config.image_processor_name or config.model_name_or_path
    flag = "image_processor_name" if config.image_processor_name else "model_name_or_path"
    if name is None:
        raise ConfigError(
            "No image processor; give --image_processor_name, or --model_name_or_path with a model that has one."
        )
    with _user_model(config, flag, name, "its image processor can't be loaded"):
        # Always Pillow's, so that pixels don't depend on whether torchvision is installed.
        return AutoImageProcessor.from_pretrained(name, backend="pil", **_hub(config))


def load_config(config: TaskConfig, tokenizer: Any) -> Any:
    """
    Load the model's config, or make one of --model_type that fits the tokenizer if any; apply --config_overrides.

    Raises ConfigError for an unknown model or type and for overrides that don't fit.
    """
    name = config.config_name or config.model_name_or_path
    base = _under_adapter(config)
    if base is not config and not config.config_name:
        file = Path(str(name)) / MODEL_CONFIG_FILE
        name = str(file) if file.is_file() else base.model_name_or_path
    if name is not None:
        flag = "config_name" if config.config_name else "model_name_or_path"
        with _user_model(config, flag, name, "its config can't be loaded"):
            model_config = AutoConfig.from_pretrained(name, **_hub(config))
        if config.config_overrides:
            model_config = with_overrides(model_config, config.config_overrides)
    elif config.model_type is not None:
        model_config = _fresh_config(config, tokenizer)
    else:
        raise ConfigError(
            "No model; give --model_name_or_path, or --model_type (or --config_name) with "
            f"--{'image_processor_name' if tokenizer is None else 'tokenizer_name'} to train from scratch."
        )
    return model_config


def with_overrides(model_config: Any, overrides: str) -> Any:
    """
    Return the config made anew with the overrides, so that what follows from them is computed from them.

    A value that only repeats what the others lead to, as the type of each layer or a head's size do, is left to be
    computed. Raises ConfigError for overrides that don't fit.
    """
    changed = _parsed(model_config, overrides)
    values = {name: value for name, value in model_config.to_dict().items() if name not in NOT_ARGUMENTS}
    same, kind = model_config.to_diff_dict(), type(model_config)
    for name in [name for name in values if name not in changed]:
        fewer = {other: value for other, value in values.items() if other != name}
        with suppress(Exception):  # a class that needs the argument may raise anything
            if kind(**fewer).to_diff_dict() == same:
                values = fewer
    return _made(kind, model_config.model_type, overrides, {**values, **changed}, like=model_config)


def _made(kind: Callable[..., Any], model_type: str, overrides: str, values: dict[str, Any], like: Any = None) -> Any:
    try:
        made = kind(**values)
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise ConfigError(
            f"--config_overrides={overrides}: {_first_line(error)}; of the {model_type} config."
        ) from error
    if like is not None:
        made.name_or_path, made._commit_hash = like.name_or_path, getattr(like, "_commit_hash", None)
    return made


def _parsed(model_config: Any, overrides: str) -> dict[str, Any]:
    """Return the overrides as values of the types that the config has. Raises ConfigError."""
    found: dict[str, Any] = {}
    try:
        for pair in overrides.split(","):
            name, value = (part.strip() for part in pair.split("="))
            if not hasattr(model_config, name):
                raise ValueError(f"{name} is not known")
            found[model_config.attribute_map.get(name, name)] = _as_typed(getattr(model_config, name), name, value)
    except ValueError as error:
        raise ConfigError(
            f"--config_overrides={overrides}: {error}; write name=value pairs of the {model_config.model_type} config, "
            "separated by commas."
        ) from error
    return found


def _as_typed(old: Any, name: str, value: str) -> Any:
    if isinstance(old, bool):
        if value.lower() not in (*TRUE, *FALSE):
            raise ValueError(f"{name}={value} is neither true nor false")
        return value.lower() in TRUE
    if isinstance(old, int | float):
        try:
            return int(value) if isinstance(old, int) else float(value)
        except ValueError as error:
            raise ValueError(f"{name}={value} is no {'whole ' if isinstance(old, int) else ''}number") from error
    if isinstance(old, str):
        return value
    if old is None:  # a number, true, false, null, or a text
        with suppress(ValueError):
            return json.loads(value)
        return value
    raise ValueError(f"{name} is a {type(old).__name__}, only numbers, texts, true and false can be given")


def load_model(config: TaskConfig, auto_class: Any, model_config: Any, tokenizer: Any) -> Any:
    """
    Load the model's weights, or make new ones if no --model_name_or_path is given.

    The embeddings grow to the size of the tokenizer, if any, where that is larger. Where --model_name_or_path is a peft
    adapter, the model is its base model with the adapter on it. Raises ConfigError for weights that can't be loaded,
    don't fit the config, or belong to an architecture without this head.
    """
    adapter, config = config, _under_adapter(config)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.dtype is not None:
        options["dtype"] = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.model_name_or_path is None:
        if options.get("dtype") == "auto":
            del options["dtype"]  # there are no weights whose type it could take
        with _user_problems(f"A new {model_config.model_type} model can't be made"):
            model = auto_class.from_config(model_config, **options)
    else:
        # An adapter has the head that it was trained with.
        other_head = config.ignore_mismatched_sizes or adapter is not config
        options |= _hub(config) | {"ignore_mismatched_sizes": other_head}
        name = config.model_name_or_path
        with _user_model(adapter, "model_name_or_path", name, "the model can't be loaded"):
            model = auto_class.from_pretrained(name, config=model_config, **options)
    if tokenizer is not None:
        _fit_embeddings(model, tokenizer)
    if adapter is not config:
        model = load_adapter(model, str(adapter.model_name_or_path), **_hub(adapter, with_code=False))
    return model


def num_token_ids(tokenizer: Any) -> int:
    """Return how many ids the tokens need: one more than the largest, which gaps put above their number."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def _fit_embeddings(model: Any, tokenizer: Any) -> None:
    """Let the embeddings grow to the tokenizer. Raises ConfigError where some stay too small for its ids."""
    needed = num_token_ids(tokenizer)
    if _smallest_vocabulary(model) >= needed:
        return
    try:
        if _num_embeddings(model.get_input_embeddings()) < needed:
            model.resize_token_embeddings(needed)
    except (NotImplementedError, AttributeError, ValueError) as error:
        logger.debug("The embeddings can't be resized.", exc_info=error)
    if (size := _smallest_vocabulary(model)) < needed:
        raise ConfigError(
            f"The tokenizer {tokenizer.name_or_path} has ids up to {needed - 1}, and a vocabulary of the model (of its "
            f"inputs, its decoder's inputs or its outputs) only {size}; give the tokenizer that belongs to the model."
        )


def _smallest_vocabulary(model: Any) -> int:
    decoder = model.get_decoder() if getattr(model.config, "is_encoder_decoder", False) else None
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    if decoder is not None and decoder is not model:
        parts.append(decoder.get_input_embeddings())
    return min((size for part in parts if (size := _num_embeddings(part))), default=sys.maxsize)


def _num_embeddings(part: Any) -> int:
    weight = getattr(part, "weight", None)
    # Where DeepSpeed has partitioned it, the weight's own shape is zero.
    return 0 if weight is None else int(getattr(weight, "ds_shape", weight.shape)[0])


def head_of(config: TaskConfig, model_config: Any, auto_class: Any) -> dict[str, bool]:
    """Return for `use_labels` whether the model comes with weights, and whether its head is among them."""
    pretrained = config.model_name_or_path is not None
    made_for = model_config.architectures or []
    has_head = any(each.__name__ in made_for for each in _classes(auto_class._model_mapping, type(model_config)))
    return {"pretrained": pretrained, "trained_head": pretrained and (has_head or _under_adapter(config) is not config)}


def _under_adapter(config: TaskConfig) -> TaskConfig:
    """
    Return the flags with the base model in place of an adapter as --model_name_or_path; unchanged for a whole model.

    Raises ConfigError for an adapter that names no base model.
    """
    name = config.model_name_or_path
    if name is None:
        return config
    with _user_model(config, "model_name_or_path", name, "it can't be loaded"):
        file = find_adapter_config_file(name, **_hub(config, with_code=False))
    if file is None:
        return config
    content = adapter_config(Path(file).parent) or {}
    base = content.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"--model_name_or_path={name} is an adapter that does not name its model.")
    return replace(config, model_name_or_path=base, model_revision=content.get("revision") or "main")


def longest_sequence(tokenizer: Any, model_config: Any) -> int:
    """Return the most tokens that both model and tokenizer take; a very large number if neither has a limit."""
    limits = [tokenizer.model_max_length, *(limit for limit in _positions(model_config) if limit > 0)]
    return int(min(limits))


def _positions(model_config: Any) -> list[int]:
    """Return how many positions the model has, its encoder and its decoder where they differ."""
    parts = [model_config, *(getattr(model_config, name, None) for name in ("encoder", "decoder", "text_config"))]
    found = [_positions_of(part) for part in parts if isinstance(part, PretrainedConfig)]
    names = ("max_encoder_position_embeddings", "max_decoder_position_embeddings")
    return [*found, *(getattr(model_config, name, None) or 0 for name in names)]


def _positions_of(model_config: Any) -> int:
    positions = getattr(model_config, "max_position_embeddings", None) or 0
    if positions <= 0 or not _counts_from_padding(type(model_config)):
        return positions
    return positions - 1 - (model_config.pad_token_id or 0)


def _counts_from_padding(kind: type[Any]) -> bool:
    """Whether the first token of a text has the position after the padding's id, as in RoBERTa, and so on up."""
    for model in _classes(MODEL_MAPPING, kind):
        module = vars(sys.modules[model.__module__])
        # Sines are computed for any position; a table of them has rows for what precedes the first.
        places = [module, *(vars(each) for each in module.values() if isinstance(each, type))]
        if any("create_position_ids_from_input_ids" in place for place in places):
            return not any("Sinusoidal" in name for name in module)
    return False


def _classes(mapping: Any, kind: type[Any]) -> Sequence[type[Any]]:
    """Return the classes of models that a mapping of Transformers has for a kind of config."""
    found = mapping.get(kind, ())
    return found if isinstance(found, tuple | list) else (found,)


def sequence_length(config: TaskConfig, tokenizer: Any, model_config: Any, *, default: int) -> int:
    """
    Return --max_seq_length, else as many tokens as fit, at most the default.

    Raises ConfigError for more than fit.
    """
    if config.max_seq_length is None:
        return min(longest_sequence(tokenizer, model_config), default)
    check_length("max_seq_length", config.max_seq_length, tokenizer, model_config)
    return config.max_seq_length


def check_length(flag: str, length: int, tokenizer: Any, model_config: Any) -> None:
    """Raise ConfigError for sequences that the model or tokenizer has no positions for."""
    longest = longest_sequence(tokenizer, model_config)
    if length > longest:
        raise ConfigError(f"--{flag}={length} is more than the model's maximum; use {longest} or less.")


def require_padding(tokenizer: Any) -> None:
    """Raise ConfigError for a tokenizer that can't pad."""
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"The tokenizer {tokenizer.name_or_path} has no padding token, and samples of unequal length "
            "need one; load it, set `tokenizer.pad_token = tokenizer.eos_token`, save it by "
            "`save_pretrained(FOLDER)` and give --tokenizer_name FOLDER."
        )


def _fresh_config(config: TaskConfig, tokenizer: Any) -> Any:
    """Make a config of --model_type that fits the tokenizer, if any, with the overrides."""
    model_type = str(config.model_type)
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "Use an architecture of Transformers, e.g. gpt2."
        raise ConfigError(f"--model_type={model_type} is not known. {hint}")
    fitting: dict[str, Any] = {} if tokenizer is None else {"vocab_size": num_token_ids(tokenizer)}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id") if tokenizer is not None else ():
        token = getattr(tokenizer, name)
        # The defaults belong to the original model's vocabulary, but BERT's padding 0 is in every vocabulary.
        if token is not None or name != "pad_token_id":
            fitting[name] = token
    make = partial(AutoConfig.for_model, model_type)
    if not config.config_overrides:
        return make(**fitting)
    changed = _parsed(make(**fitting), config.config_overrides)
    return _made(make, model_type, config.config_overrides, {**fitting, **changed})


def _hub(config: TaskConfig, *, with_code: bool = True) -> dict[str, Any]:
    options = {"cache_dir": config.cache_dir, "revision": config.model_revision, "token": config.token}
    return options | ({"trust_remote_code": config.trust_remote_code} if with_code else {})


@contextmanager
def _user_model(config: TaskConfig, flag: str, name: str, what: str) -> Iterator[None]:
    """As `_user_problems`, of what a flag names: a folder, a model on the Hub, or the model under an adapter."""
    given = getattr(config, flag)
    shown = f"--{flag}={given}: " + ("" if name == given else f"its base model is {name}, and ") + what
    with _user_problems(shown, lambda error: why_not_found(error, name, cache_dir=config.cache_dir)):
        yield


@contextmanager
def _user_problems(what: str, why: Callable[[Exception], str] | None = None) -> Iterator[None]:
    """Turn what Transformers raises for files it can't load into ConfigError; use it around one call."""
    try:
        yield
    except (OSError, ImportError, ValueError, ArithmeticError, SafetensorError, StrictDataclassError) as error:
        # ArithmeticError: a size of 0 in the config. ImportError: an attention whose package is not installed.
        raise ConfigError(f"{what}: {(why or _first_line)(error)}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(
            f"{what}: weights have another shape than the config says; give a config that fits (of a classifier: "
            "labels that it knows), or --ignore_mismatched_sizes, which makes these weights anew and loses what they "
            "have learnt."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
