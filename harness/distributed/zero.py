"""DeepSpeed's ZeRO: its engine steps; its configuration from our flags, its shards in a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers.trainer_utils import _is_peft_model

from harness.distributed.backend import OptimizerFiles, Stepper, StepSize, check_wrapped, no_agreement
from harness.distributed.launch import where
from harness.distributed.sharding import whole_on_first
from harness.errors import ConfigError
from harness.files import load_safely

STAGES = (1, 2, 3)
LATEST_FILE = "latest"  # the name of the folder with the shards is in it


class ZeroStepper:
    """
    With DeepSpeed, whose engine reduces, clips and steps in one.

    Accelerate's `backward` steps too; here the engine is asked for each by itself, so that the loop stays what it is
    and the gradients of a step can be looked at before it is made.
    """

    def __init__(self, engine: Any, optimizer: AcceleratedOptimizer) -> None:
        self.engine, self.optimizer = engine, optimizer
        self.num_skipped = 0

    @property
    def scales_loss(self) -> bool:
        """Whether the engine trains with fp16."""
        return bool(self.engine.fp16_enabled())

    @property
    def was_skipped(self) -> bool:
        """Whether the loss scaler has skipped the last step."""
        return not self.engine.was_step_applied()

    def take_skipped(self) -> int:
        """All of them."""
        taken, self.num_skipped = self.num_skipped, 0
        return taken

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Tell the engine whether the step follows."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """The engine's, without a division by the accumulation: the loss has it already."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, max_grad_norm: float) -> torch.Tensor | float:
        """Reduce, clip, step and forget the gradients; the limit is that of the engine's configuration."""
        self.engine.step()
        self.optimizer.step()  # does nothing; the schedule warns unless it was called
        self.num_skipped += self.was_skipped
        norm: torch.Tensor | float | None = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def zero_grad(self) -> None:
        """The engine has done it."""


class Zero:
    """The backend of DeepSpeed's ZeRO, in the stages 1, 2 and 3; in the last one weights are divided too."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def zero_stage(self) -> int:
        """The stage that the launch config asks for."""
        return int(self.accelerator.deepspeed_plugin.zero_stage)

    @property
    def is_sharded(self) -> bool:
        """Whether weights are divided."""
        return self.zero_stage == 3

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, size: StepSize
    ) -> tuple[torch.nn.Module, AcceleratedOptimizer, Stepper]:
        """Collective: see Backend. Raises ConfigError where the launch config and the flags contradict each other."""
        from deepspeed import DeepSpeedEngine

        fill_config(self.accelerator, size)
        engine, prepared = self.accelerator.prepare(model, optimizer)
        check_wrapped(engine, DeepSpeedEngine, self.accelerator.distributed_type)
        return engine, prepared, ZeroStepper(engine, prepared)

    def prepare_for_evaluation(self, model: torch.nn.Module, size: StepSize) -> torch.nn.Module:
        """Collective: divided in stage 3, else on its device."""
        prepared: torch.nn.Module
        if self.is_sharded:
            fill_config(self.accelerator, size)
            prepared = self.accelerator.prepare(model)
        else:
            prepared = self.accelerator.prepare_model(model, evaluation_mode=True)
        return prepared

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Collective: copies on rank zero in stage 3, else the tensors themselves."""
        if self.is_sharded:
            return whole_on_first(tensors)
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def save_optimizer(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, step: int) -> OptimizerFiles:
        """Local: what lets DeepSpeed's engine write its shards."""
        return OptimizerFiles(write_shards=partial(save_shards, model, step=step))

    def load_optimizer(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, files: Mapping[str, Any]
    ) -> None:
        """Collective: let DeepSpeed's engine read its shards."""
        load_shards(model, folder)

    def gradient_function(self) -> Callable[[torch.nn.Parameter], torch.Tensor | None]:
        """Collective, once it is called: DeepSpeed's. Raises ConfigError for fp16, whose gradients are scaled."""
        if self.accelerator.mixed_precision == "fp16":
            raise ConfigError(
                "--wandb_watch does not see fp16's gradients under DeepSpeed; use --bf16, or leave it out."
            )
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad  # type: ignore[no-any-return]

    def writers_agreement(self) -> Callable[[BaseException | None], str | None]:
        """The engine's shards are written before the training goes on: rank zero's thread is the only one."""
        return no_agreement


def fill_config(accelerator: Accelerator, size: StepSize) -> None:
    """
    Fill what DeepSpeed's configuration leaves open, `auto`, from our flags. Raises ConfigError where both differ.

    Call it before `prepare`.
    """
    stage = int(accelerator.deepspeed_plugin.zero_stage)
    if stage not in STAGES:
        raise ConfigError(
            f"zero_stage: {stage} in the launch config is not supported; use 1, 2 or 3, or launch_configs/ddp.yaml: "
            f"change {where('zero_stage')}."
        )
    config: dict[str, Any] = accelerator.deepspeed_plugin.deepspeed_config
    samples = size.batch_size * size.accumulation * accelerator.num_processes
    values = {
        "train_micro_batch_size_per_gpu": (size.batch_size, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (size.accumulation, "gradient_accumulation_steps"),
        "train_batch_size": (samples, "per_device_train_batch_size"),
        "gradient_clipping": (size.max_grad_norm, "max_grad_norm"),
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
    accelerator.gradient_accumulation_steps = size.accumulation  # else accelerate warns that the two differ
    if stage == 3:
        # DeepSpeed calls torch by older names, some of them at each step.
        warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
        from transformers.integrations import HfDeepSpeedConfig

        # Transformers then knows that ranks have to generate together; it lives as long as the plugin.
        accelerator.deepspeed_plugin.dschf = HfDeepSpeedConfig(config)


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
