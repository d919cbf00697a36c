"""Adapters of peft (LoRA and others): a few new weights are trained on top of a frozen model."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.auto import modeling_auto
from transformers.trainer_utils import _is_peft_model
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from harness.errors import ConfigError
from harness.model.flags import LORA_ALPHA, LORA_DROPOUT, LORA_R, AdapterConfig

INSTALL = "pip install 'accelerate-harness[peft]'"
# The model's config beside an adapter: at a config.json Transformers would expect the model's own weights.
MODEL_CONFIG_FILE = "model_config.json"
ADAPTER = "default"  # get_peft_model's name for an adapter
# peft's task types: the names of each one's models, and the class that loads one.
TASK_TYPES = {
    "SEQ_CLS": (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "AutoModelForSequenceClassification"),
    "TOKEN_CLS": (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "AutoModelForTokenClassification"),
    "QUESTION_ANS": (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "AutoModelForQuestionAnswering"),
    "SEQ_2_SEQ_LM": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "AutoModelForSeq2SeqLM"),
    "CAUSAL_LM": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "AutoModelForCausalLM"),
}
AUTO_CLASSES = frozenset(name for _, name in TASK_TYPES.values())


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether the model has a peft adapter."""
    return bool(_is_peft_model(model))


def add_adapter(model: torch.nn.Module, config: AdapterConfig) -> torch.nn.Module:
    """
    Return the model with a new adapter, drawn from the global generators; only its weights are trained.

    A model that has an adapter keeps it. Raises ConfigError for what peft does not take or what could not be resumed.
    """
    if not config.is_on:
        if config.save_merged_model and not is_adapted(model):
            raise ConfigError(
                "--save_merged_model merges an adapter, and there is none: give --use_peft, or leave it out."
            )
        return model if not is_adapted(model) else checked(model)
    if is_adapted(model):
        raise ConfigError(
            "The model has an adapter already, which is trained on: leave --use_peft, --lora_* and --peft_config out, "
            "or give the model that the adapter belongs to."
        )
    peft = import_peft("--use_peft")
    with _peft_problems("The adapter does not fit the model"):
        return checked(peft.get_peft_model(model, _peft_config(model, config, peft)))


def _peft_config(model: torch.nn.Module, config: AdapterConfig, peft: Any) -> Any:
    task_type = next((kind for kind, (names, _) in TASK_TYPES.items() if _is_one_of(model, names)), None)
    if config.peft_config is not None:
        # Without the entries of an adapter_config.json that are about another base model, or about inference.
        unmeant = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
        values = {name: value for name, value in config.peft_config.items() if name not in unmeant}
        known = sorted(kind.value for kind in peft.PeftType)
        if values["peft_type"] not in known:
            raise ConfigError(
                f"--peft_config: peft_type {values['peft_type']} is not known; use one of: {', '.join(known)}."
            )
        return peft.get_peft_config({"task_type": task_type, **values})
    targets = config.lora_target_modules
    return peft.LoraConfig(
        task_type=task_type,
        r=LORA_R if config.lora_r is None else config.lora_r,
        lora_alpha=LORA_ALPHA if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=LORA_DROPOUT if config.lora_dropout is None else config.lora_dropout,
        target_modules=targets[0] if targets is not None and len(targets) == 1 else targets,
        modules_to_save=config.lora_modules_to_save,
    )


def _is_one_of(model: torch.nn.Module, names: Mapping[str, Any]) -> bool:
    known = {name for each in names.values() for name in ((each,) if isinstance(each, str) else each)}
    return type(model).__name__ in known


def checked(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model. Raises ConfigError if its adapter could not be trained or resumed correctly."""
    adapters: Any = model.peft_config
    if list(adapters) != [ADAPTER]:
        raise ConfigError(
            f"The model has the adapters {', '.join(adapters)}: one is trained, and it has to be called {ADAPTER!r}."
        )
    kind = adapters[ADAPTER].peft_type.value
    if kind == "ADALORA":
        raise ConfigError(
            "--peft_config: ADALORA has to be told of each step, and the loop does not do that; use LORA."
        )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    saved = sum(tensor.numel() for tensor in tensors_of(model).values())
    if saved < trained:
        raise ConfigError(
            f"--peft_config: of {trained:,} weights that {kind} trains like this peft saves {saved:,}, so no "
            "checkpoint could be resumed; use another peft_type, or one without a projection."
        )
    return model


def check_scores(model: torch.nn.Module, *, has_scores: bool) -> None:
    """Raise ConfigError for an adapter with more logits than labels, where scores compare the two."""
    if not has_scores or not is_adapted(model):
        return
    adapted: Any = model
    adapter = adapted.peft_config[ADAPTER]
    kind = adapter.peft_type.value
    if kind.endswith("PROMPT_TUNING") and adapter.task_type in ("CAUSAL_LM", "TOKEN_CLS"):
        raise ConfigError(
            f"--peft_config: {kind} puts tokens before the text, so the scores don't know what belongs to what: give "
            "--prediction_loss_only, or use LORA or PREFIX_TUNING."
        )


def describe(model: torch.nn.Module) -> str:
    """Return the adapter's name and the number of trained parameters as text; empty without an adapter."""
    if not is_adapted(model):
        return ""
    adapted: Any = model
    trained, total = adapted.get_nb_trainable_parameters()
    kind = adapted.peft_config[ADAPTER].peft_type.value
    return f"{kind}: {trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)."


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters (no copies) that are saved of a model with an adapter, by their names in the file."""
    from peft import get_peft_model_state_dict

    options = {"adapter_name": ADAPTER, "save_embedding_layers": _saves_embeddings(model)}
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, model.state_dict(keep_vars=True), **options)
    return tensors


@functools.lru_cache(maxsize=1)
def _saves_embeddings(model: torch.nn.Module) -> bool:
    """Whether peft would save the embeddings too. It asks the Hub, so this is asked once, not at each save."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft warns about what it decides by itself
        found = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    return len(found) > len(get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False))


def load_tensors(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load what `tensors_of` returned into a model with the same adapter."""
    from peft import set_peft_model_state_dict

    if tensors:
        set_peft_model_state_dict(model, dict(tensors), adapter_name=ADAPTER)


def write_adapter(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path, *, with_card: bool
) -> None:
    """
    Write the files of PeftModel.save_pretrained: the adapter's weights and configuration, not the model's weights.

    The model's configuration is added, since nothing else has the names of the labels. `tensors` are those of
    `tensors_of`, or copies: the model may be trained meanwhile. `with_card` adds peft's README.
    """
    adapted: Any = model
    config = copy.deepcopy(adapted.peft_config[ADAPTER])
    base = adapted.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    config.inference_mode = True
    kind = type(base)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=mapping if config.task_type is None else None)
    if isinstance(base, transformers.PreTrainedModel):
        base.config.to_json_file(folder / MODEL_CONFIG_FILE)
    # safetensors only takes contiguous tensors that share no memory.
    plain = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(plain, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    if with_card:
        complete_card(model, folder)


def complete_card(model: torch.nn.Module, folder: Path) -> None:
    """Let peft write its README.md, or add its content to the one that is there."""
    adapted: Any = model
    adapted.create_or_update_model_card(str(folder))


def adapter_config(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's adapter_config.json; None if there is none. Raises ConfigError."""
    file = folder / ADAPTER_CONFIG_NAME
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no JSON object, so it describes no adapter.")
    return content


def why_not_found(error: Exception, name: str, *, cache_dir: str | None = None) -> str:
    """Return in one line why Transformers could not load a name, a folder's or the Hub's, and what to do."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if "couldn't connect" in reason.lower() or "offline mode" in reason.lower():
        fetch = f"hf download {name}" + (f" --cache-dir {cache_dir}" if cache_dir else "")
        return (
            "no such folder here, not in the Hub's cache, and the Hub can't be reached; check the name, or run "
            f"`{fetch}` where there is a network first"
        )
    if any(each in reason for each in ("Repo id must", "Incorrect path_or_model_id")):
        return f"no such folder, and no name that a model of the Hub could have; relative paths start at {Path.cwd()}"
    if "is not a local folder and is not a valid model identifier" in reason:
        return "no such folder here, and none of that name on the Hub; a private one needs `hf auth login`, or --token"
    return reason


def load_adapter(model: torch.nn.Module, source: str, **options: Any) -> torch.nn.Module:
    """Return the model with the adapter of a folder or of the Hub, trainable. Raises ConfigError."""
    peft = import_peft(f"--model_name_or_path={source} is an adapter: it")
    with _peft_problems(f"--model_name_or_path={source}: the adapter does not fit its model"):
        return checked(peft.PeftModel.from_pretrained(model, source, is_trainable=True, **options))


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """Merge the adapter into the weights, in place, and return the model without it. Raises ConfigError."""
    adapted: Any = model
    if (kind := adapted.peft_config[ADAPTER]).is_prompt_learning:
        raise ConfigError(f"--save_merged_model: {kind.peft_type.value} adds tokens, which can't be merged.")
    with _peft_problems("--save_merged_model: the adapter can't be merged"):
        whole: torch.nn.Module = adapted.merge_and_unload()
    return whole


def merged_model(folder: Path) -> torch.nn.Module:
    """
    Return the whole model for an adapter's folder, on the CPU: load its base model, merge the adapter into it.

    Raises ConfigError if the folder names no base model that can be loaded.
    """
    found = adapter_config(folder) or {}
    base, mapping = found.get("base_model_name_or_path"), found.get("auto_mapping")
    if not base or not isinstance(base, str):
        raise ConfigError(f"{folder} does not name the model that its adapter belongs to; it can't be merged.")
    name = TASK_TYPES.get(str(found.get("task_type")), (None, None))[1]
    name = name or (mapping.get("base_model_class") if isinstance(mapping, dict) else None)
    kind = getattr(transformers, str(name), None)
    # Not whatever else Transformers has under that name.
    is_model = isinstance(kind, type) and (issubclass(kind, transformers.PreTrainedModel) or name in AUTO_CLASSES)
    if kind is None or not is_model:
        raise ConfigError(f"{folder}: its model {base} is of the class {name}, which Transformers does not have.")
    options: dict[str, Any] = {"revision": str(found["revision"])} if found.get("revision") else {}
    file = folder / MODEL_CONFIG_FILE
    try:
        if file.is_file():  # the adapter may have another head than the base
            options |= {"config": transformers.AutoConfig.from_pretrained(file), "ignore_mismatched_sizes": True}
        model = kind.from_pretrained(base, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: its model {base} can't be loaded: {why_not_found(error, base)}.") from error
    return merged(load_adapter(model, str(folder)))


def import_peft(what: str) -> Any:
    """Return the package peft. Raises ConfigError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"{what} needs a package: {INSTALL}.") from error
    return peft


@contextmanager
def _peft_problems(what: str) -> Iterator[None]:
    """Turn what peft raises for configurations into ConfigError; use it around one call."""
    try:
        with warnings.catch_warnings():
            # It puts the one right itself; the other is between it and Transformers.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{what}: {' '.join(reason[:3])}") from error
