"""Checks of a job before it is submitted. Each returns what it found as text, or raises ConfigError."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from harness.errors import ConfigError, UnreachableError
from harness.flags import Config
from harness.tasks.files import data_files
from harness.tasks.flags import TaskConfig
from harness.tasks.hub import Wanted
from harness.tasks.pretrained import with_overrides
from harness.tasks.text.glue import HUB_NAME
from harness.tracking import TrackingConfig
from harness.tracking.client import has_credentials, open_api
from harness.tracking.run.open import NEEDS_CREDENTIALS

SUPPORTED = ("NO", "MULTI_GPU", "FSDP", "DEEPSPEED")
GIB = 2**30
# AdamW keeps two numbers of 4 bytes for each weight.
OPTIMIZER_BYTES = 8
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.safetensors.index.json")


def check_launch_config(path: Path, *, num_processes: int, uses_gpus: bool) -> str:
    """Compare the launch config with the request; the scripts set the numbers of processes and machines."""
    try:
        launch = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--launch-config={path}: no such file; see launch_configs/.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--launch-config={path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(launch, dict):
        raise ConfigError(f"--launch-config={path} is no launch config; see launch_configs/.")
    kind = str(launch.get("distributed_type", "NO"))
    if kind not in SUPPORTED:
        raise ConfigError(
            f"{path}: distributed_type: {kind} is not supported (MULTI_CPU starts one process); use one of "
            f"{', '.join(SUPPORTED)}, as the files in launch_configs/ do."
        )
    if kind == "NO" and num_processes > 1:
        raise ConfigError(
            f"{path}: distributed_type: NO starts one process, the request is for {num_processes}: "
            "use launch_configs/ddp.yaml, or ask for --nodes 1 --gpus-per-node 1."
        )
    if kind == "DEEPSPEED":
        _check_deepspeed(path, launch)
    if kind == "FSDP" and (launch.get("fsdp_config") or {}).get("fsdp_version") != 2:
        raise ConfigError(f"{path}: FSDP without fsdp_version: 2 is not supported; use launch_configs/fsdp2.yaml.")
    if launch.get("use_cpu") and uses_gpus:
        raise ConfigError(f"{path}: use_cpu: true leaves the GPUs idle; give --gpus-per-node 0, or take it out.")
    precision = str(launch.get("mixed_precision", "no"))
    if precision in ("fp16", "fp8") and not uses_gpus:
        raise ConfigError(f"{path}: mixed_precision: {precision} needs a GPU; use bf16 or no with --gpus-per-node 0.")
    return f"{path.name} on {num_processes} process{'' if num_processes == 1 else 'es'}"


def _check_deepspeed(path: Path, launch: dict[str, Any]) -> None:
    if find_spec("deepspeed") is None:
        raise ConfigError(
            f"{path}: distributed_type: DEEPSPEED, and deepspeed is not installed: "
            "pip install 'accelerate-harness[deepspeed]', or use launch_configs/fsdp2.yaml or ddp.yaml."
        )
    own = (launch.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if own and not Path(own).is_file():
        raise ConfigError(f"{path}: deepspeed_config_file: {own}: no such file (relative paths start at {Path.cwd()}).")


def check_cache(task: TaskConfig, *, is_offline: bool) -> str:
    """Check that model and data are cached where nodes without internet find them."""
    for name in ("train_file", "validation_file", "test_file"):
        data_files(name, getattr(task, name) or ())
    for name, given in ((name, getattr(task, name)) for name in ("train_dir", "validation_dir")):
        if given and not Path(given).is_dir():
            raise ConfigError(f"--{name}={given}: no such folder; check the path.")
    if not is_offline:
        return "model and data may come from the Hub (HF_HUB_OFFLINE is not set)"
    names = ("model_name_or_path", "config_name", "tokenizer_name", "image_processor_name")
    for name, given in ((name, getattr(task, name)) for name in names):
        if given and given.startswith("wandb:"):
            raise ConfigError(
                f"--{name}={given} needs the network, and the nodes have none: download it, give the folder."
            )
        if given and not Path(given).exists():
            _check_model(name, given, task)
    if (dataset := task.dataset_name or (HUB_NAME if task.task_name and not task.train_file else None)) is not None:
        _check_dataset(dataset, task)
    return "model and data are on this disk"


def _check_model(flag: str, name: str, task: TaskConfig) -> None:
    def find(file: str) -> Path | None:
        found = try_to_load_from_cache(name, file, cache_dir=task.cache_dir, revision=task.model_revision)
        return Path(found) if isinstance(found, str) else None

    known = ("config.json", "adapter_config.json", "tokenizer_config.json", "preprocessor_config.json")
    folder = next((path.parent for path in map(find, known) if path is not None), None)
    has_weights = folder is not None and any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))
    if folder is None or (flag == "model_name_or_path" and not has_weights):
        command = f"hf download {name}" + (f" --cache-dir {task.cache_dir}" if task.cache_dir else "")
        raise ConfigError(
            f"--{flag}={name} is not in the cache, and the nodes have no internet: run `{command}` here first, or give "
            "a folder."
        )


def _check_dataset(name: str, task: TaskConfig) -> None:
    if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")) or Path(name).is_dir():
        return
    if task.streaming:
        raise ConfigError(f"--streaming of {name} needs the network, and the nodes have none: leave it out.")
    wanted = Wanted("dataset_name", name, is_dataset=True)
    if not wanted.is_cached(task):
        raise ConfigError(
            f"--dataset_name={name} is not in the cache, and the nodes have no internet: run `HF_HUB_OFFLINE=0 "
            f"{wanted.download(task)}` here first, or give a folder."
        )


def check_disk(config: Config, output_dir: Path) -> str:
    """Compare the free space at the run's folder with the estimated size of the checkpoints that exist at once."""
    place = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.is_dir())
    if not os.access(place, os.W_OK):
        raise ConfigError(f"--output_dir={output_dir}: {place} can't be written; take another folder.")
    parameters = None if config.adapters.is_on else num_parameters(config.task)
    if parameters is None:
        return "disk space is not estimated: the size of the model is not known here"
    free = shutil.disk_usage(place).free
    each = parameters * (4 if config.checkpoint.save_only_model else 4 + OPTIMIZER_BYTES)
    number = _most_checkpoints(config)
    need = number * each + parameters * 4
    kept = config.checkpoint.save_total_limit or "none"
    what = (
        f"{parameters / 1e6:.1f} M parameters, about {each / GIB:.2f} GiB a checkpoint, up to {number} of them at once "
        f"and the model (--save_total_limit {kept}): {need / GIB:.2f} GiB"
    )
    if need > free:
        raise ConfigError(
            f"{place} has {free / GIB:.2f} GiB free; {what}. Make room, or give another --output_dir, a smaller "
            "--save_total_limit or a larger --save_steps."
        )
    return f"{what} of {free / GIB:.0f} free"


def _most_checkpoints(config: Config) -> int:
    plan, limit = config.plan, config.checkpoint.save_total_limit
    if plan.save_strategy == "no":
        return 0
    if limit is not None:  # an old one is deleted after the new one is written; the best stays beside the newest
        return max(limit, 2 if config.best.load_best_model_at_end else 1) + 1
    if plan.save_strategy == "steps" and plan.max_steps > 0:
        return int(max(plan.max_steps // plan.save_steps, 1)) if plan.save_steps >= 1 else round(1 / plan.save_steps)
    return max(int(plan.num_train_epochs), 1) if plan.save_strategy == "epoch" else 2


def num_parameters(task: TaskConfig) -> int | None:
    """
    Return the model's number of parameters, counted without allocating it.

    None if it can't be known on this machine.
    """
    try:
        if (name := task.config_name or task.model_name_or_path) is not None:
            model_config = AutoConfig.from_pretrained(
                name, revision=task.model_revision, cache_dir=task.cache_dir, local_files_only=True
            )
        elif task.model_type in CONFIG_MAPPING:
            model_config = CONFIG_MAPPING[task.model_type]()
        else:
            return None
        if task.config_overrides:
            model_config = with_overrides(model_config, task.config_overrides)
        auto_class = AutoModelForCausalLM if task.task == "causal-lm" else AutoModel
        with torch.device("meta"):
            model = auto_class.from_config(model_config)
    except (OSError, ValueError, TypeError, KeyError):  # not on this machine, or a model with code of its own
        return None
    return int(sum(parameter.numel() for parameter in model.parameters()))


def check_tracking(config: TrackingConfig, *, has_internet: bool, mode: str | None) -> str:
    """Return where the rows go. `mode` is WANDB_MODE in the job."""
    if not config.uses_wandb or config.wandb_mode == "disabled":
        return "no W&B"
    if not has_internet and config.wandb_mode == "online":
        raise ConfigError(
            "--wandb_mode=online with --no-internet: leave one of them out; `harness sync` brings offline runs."
        )
    if not has_internet or mode == "offline" or config.wandb_mode == "offline":
        return "W&B is offline, `harness sync` brings it"
    if not has_credentials():
        if config.wandb_mode == "online":
            raise ConfigError(NEEDS_CREDENTIALS)
        return "no W&B credentials: the run will be offline (`wandb login` first, or `harness sync` later)"
    try:
        open_api("harness submit", silent=True)
    except UnreachableError as error:
        if config.wandb_mode == "online":
            raise ConfigError(f"--wandb_mode=online: {error} Try again, or give --no-internet.") from error
        return f"{error} The run will be offline if the nodes can't reach it either"
    return "W&B answers here; a node that can't reach it makes the run offline"
