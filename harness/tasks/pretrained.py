"""Load tokenizer or image processor, config and model from a folder or the Hub, or make them from scratch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from harness.errors import ConfigError
from harness.model.adapters import MODEL_CONFIG_FILE, adapter_config, load_adapter
from harness.tasks.flags import TaskConfig


def load_tokenizer(config: TaskConfig, **options: Any) -> Any:
    """Load the tokenizer of --tokenizer_name or of the model, with its own `options`. Raises ConfigError."""
    name = config.tokenizer_name or config.model_name_or_path
    base = _under_adapter(config)
    if name is not None and base is not config and not any(Path(name).glob("tokenizer*")):
        name = base.model_name_or_path  # the adapter was saved without a tokenizer
    flag = "tokenizer_name" if config.tokenizer_name else "model_name_or_path"
    if name is None:
        raise ConfigError("No tokenizer; give --tokenizer_name, or --model_name_or_path with a model that has one.")
    with _user_model(f"--{flag}={name}: its tokenizer can't be loaded"):
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
    with _user_model(f"--{flag}={name}: its image processor can't be loaded"):
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
        with _user_model(f"--{flag}={name}: its config can't be loaded"):
            model_config = AutoConfig.from_pretrained(name, **_hub(config))
    elif config.model_type is not None:
        model_config = _fresh_config(config.model_type, tokenizer)
    else:
        raise ConfigError(
            "No model; give --model_name_or_path, or --model_type (or --config_name) with "
            f"--{'image_processor_name' if tokenizer is None else 'tokenizer_name'} to train from scratch."
        )
    if config.config_overrides:
        try:
            model_config.update_from_string(config.config_overrides)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"--config_overrides={config.config_overrides}: {error}; write name=value pairs of the "
                f"{model_config.model_type} config, separated by commas."
            ) from error
    return model_config


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
        with _user_model(f"A new {model_config.model_type} model can't be made"):
            model = auto_class.from_config(model_config, **options)
    else:
        # An adapter has the head that it was trained with.
        other_head = config.ignore_mismatched_sizes or adapter is not config
        options |= _hub(config) | {"ignore_mismatched_sizes": other_head}
        with _user_model(f"--model_name_or_path={config.model_name_or_path}: the model can't be loaded"):
            model = auto_class.from_pretrained(config.model_name_or_path, config=model_config, **options)
    # Not the weight's shape: it is zero where DeepSpeed has partitioned it.
    if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    if adapter is not config:
        model = load_adapter(model, str(adapter.model_name_or_path), **_hub(adapter, with_code=False))
    return model


def _under_adapter(config: TaskConfig) -> TaskConfig:
    """
    Return the flags with the base model in place of an adapter as --model_name_or_path; unchanged for a whole model.

    Raises ConfigError for an adapter that names no base model.
    """
    name = config.model_name_or_path
    if name is None:
        return config
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
    positions = getattr(model_config, "max_position_embeddings", None) or 0
    limits = [tokenizer.model_max_length, *([positions] if positions > 0 else [])]
    return int(min(limits))


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


def _fresh_config(model_type: str, tokenizer: Any) -> Any:
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "Use an architecture of Transformers, e.g. gpt2."
        raise ConfigError(f"--model_type={model_type} is not known. {hint}")
    if tokenizer is None:
        return AutoConfig.for_model(model_type)
    fitting: dict[str, Any] = {"vocab_size": len(tokenizer)}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        # The defaults belong to the original model's vocabulary, but BERT's padding 0 is in every vocabulary.
        if token is not None or name != "pad_token_id":
            fitting[name] = token
    return AutoConfig.for_model(model_type, **fitting)


def _hub(config: TaskConfig, *, with_code: bool = True) -> dict[str, Any]:
    options = {"cache_dir": config.cache_dir, "revision": config.model_revision, "token": config.token}
    return options | ({"trust_remote_code": config.trust_remote_code} if with_code else {})


@contextmanager
def _user_model(what: str) -> Iterator[None]:
    """Turn what Transformers raises for files it can't load into ConfigError; use it around one call."""
    try:
        yield
    except (OSError, ImportError, ValueError, ArithmeticError, SafetensorError) as error:
        # ArithmeticError: a size of 0 in the config. ImportError: an attention whose package is not installed.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{what}: {reason[0]}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(
            f"{what}: weights have another shape than the config says; give "
            "--ignore_mismatched_sizes to make them anew, or a config that fits."
        ) from error
