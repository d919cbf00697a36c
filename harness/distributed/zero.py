"""DeepSpeed ZeRO: its configuration from our flags, its part of a checkpoint, written and read by all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from transformers.trainer_utils import _is_peft_model

from harness.distributed.launch import where
from harness.errors import ConfigError
from harness.files import load_safely

STAGES = (1, 2, 3)
LATEST_FILE = "latest"  # the name of the folder with the shards is in it


def is_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed trains."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def zero_stage(accelerator: Accelerator) -> int:
    """The stage of ZeRO, 0 without DeepSpeed."""
    return int(accelerator.deepspeed_plugin.zero_stage) if is_zero(accelerator) else 0


def fill_config(accelerator: Accelerator, *, batch_size: int, accumulation: int, max_grad_norm: float) -> None:
    """
    Fill what DeepSpeed's configuration leaves open, `auto`, from our flags. Raises ConfigError where both differ.

    Call it before `prepare`.
    """
    stage = zero_stage(accelerator)
    if stage not in STAGES:
        raise ConfigError(
            f"zero_stage: {stage} in the launch config is not supported; use 1, 2 or 3, or launch_configs/ddp.yaml: "
            f"change {where('zero_stage')}."
        )
    config: dict[str, Any] = accelerator.deepspeed_plugin.deepspeed_config
    values = {
        "train_micro_batch_size_per_gpu": (batch_size, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "gradient_accumulation_steps"),
        "train_batch_size": (batch_size * accumulation * accelerator.num_processes, "per_device_train_batch_size"),
        "gradient_clipping": (max_grad_norm, "max_grad_norm"),
    }
    wrong = []
    for name, (value, flag) in values.items():
        given = config.get(name)
        if given in (None, "auto", "None"):
            config[name] = value
        elif given != value:
            wrong.append(
                f"{name}: {given} in DeepSpeed's configuration contradicts --{flag} {value} (see {where(name)})"
            )
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}. Write auto there, or leave it out: the flags fill it.")
    # A torch optimizer on the CPU is as good there; DeepSpeed's own would have to be compiled.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    accelerator.gradient_accumulation_steps = accumulation  # else accelerate warns that the two differ
    if stage == 3:
        # DeepSpeed calls torch by older names, some of them at each step.
        warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
        from transformers.integrations import HfDeepSpeedConfig

        # Transformers then knows that ranks have to generate together; it lives as long as the plugin.
        accelerator.deepspeed_plugin.dschf = HfDeepSpeedConfig(config)


def gradient_function(accelerator: Accelerator) -> Callable[[torch.nn.Parameter], torch.Tensor | None] | None:
    """
    Collective: what gives the whole gradient of a parameter, after the last backward of a step and before the step.

    None without DeepSpeed, where it is the parameter's `grad`. Raises ConfigError for fp16, whose gradients are scaled.
    """
    if not is_zero(accelerator):
        return None
    if accelerator.mixed_precision == "fp16":
        raise ConfigError("--wandb_watch does not see fp16's gradients under DeepSpeed; use --bf16, or leave it out.")
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad  # type: ignore[no-any-return]


def gathered(parameters: Iterable[torch.Tensor], *, written_by: int | None = None) -> AbstractContextManager[Any]:
    """
    Collective: within it parameters that ZeRO-3 has divided are whole; what rank `written_by` makes of them is kept.

    Others are what they are.
    """
    divided = [parameter for parameter in parameters if is_divided(parameter)]
    if not divided:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[Any] = GatheredParameters(divided, modifier_rank=written_by)
    return context


def is_divided(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 has divided it among the ranks: it looks empty."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Its shape, when it is whole."""
    shape: torch.Size = parameter.ds_shape if is_divided(parameter) else parameter.shape  # type: ignore[attr-defined]
    return shape


def num_parameters(model: torch.nn.Module, *, exclude_embeddings: bool = False) -> int | None:
    """What `model.num_parameters()` says, of divided parameters their whole; None where there is no such method."""
    count: Any = getattr(model, "num_parameters", None)
    if not callable(count):
        return None
    left_out = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)] if exclude_embeddings else []
    ids = {id(parameter) for module in left_out for parameter in module.parameters()}
    unseen = (p for p in model.parameters() if is_divided(p) and p.numel() == 0 and id(p) not in ids)
    own = int(count(exclude_embeddings=True)) if exclude_embeddings else int(count())
    return own + sum(whole_shape(parameter).numel() for parameter in unseen)


def save_shards(engine: Any, folder: Path, *, step: int) -> None:
    """
    Collective: each rank writes its part of the optimizer's state, rank zero the module's, as the Trainer does.

    Of a model with an adapter what is frozen is left out. Raises what writing raises, on this rank alone and when all
    are done: inside of DeepSpeed the others would wait.
    """
    failures: list[Exception] = []

    def write(state_dict: Any, path: str) -> None:  # called by these names too
        try:
            torch.save(state_dict, path)
        except Exception as error:  # torch has types of its own for a full disk
            failures.append(error)

    tag = f"global_step{step}"
    files = engine.checkpoint_engine
    # Its scripts are left out: model.safetensors holds the weights.
    files.save, engine._copy_recovery_script = write, lambda _: None
    try:
        adapted = _is_peft_model(engine.module)
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=adapted)
    finally:
        del files.save, engine._copy_recovery_script
    if failures:
        raise failures[0]
    if engine.global_rank == 0:
        (folder / LATEST_FILE).write_text(tag, encoding="utf-8")


def load_shards(engine: Any, folder: Path) -> None:
    """
    Collective: take back what `save_shards` wrote, on as many ranks.

    DeepSpeed would unpickle whatever is in the files: here they hold tensors and plain values, or raise ConfigError.
    """
    files = engine.checkpoint_engine
    files.load = load_shard
    try:
        strict = not _is_peft_model(engine.module)  # what is frozen is not in it
        loaded, _ = engine.load_checkpoint(str(folder), load_module_strict=strict, load_lr_scheduler_states=False)
    except (OSError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"{folder} can't be loaded by DeepSpeed: {type(error).__name__} {error}") from error
    finally:
        del files.load
    if loaded is None:
        raise ConfigError(f"{folder} holds no state of DeepSpeed's; use the launch config that it was saved with.")


def load_shard(path: str, map_location: Any = None, *, mmap: bool = False) -> Any:
    """Read one file of DeepSpeed's: tensors, plain values and a few records of its own. Raises ConfigError."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    records = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    return load_safely(path, map_location, records, mmap=mmap)
