"""The backend of DeepSpeed's ZeRO: its configuration from our flags, its engine's steps, its shards in a checkpoint."""

from __future__ import annotations

import re
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
from harness.distributed.optimizer_shards import check_optimizer_file, check_state, why_unlike
from harness.distributed.ranks import agree
from harness.distributed.sharding import whole_on_first
from harness.errors import ConfigError
from harness.files import load_safely

STAGES = (1, 2, 3)
LATEST_FILE = "latest"  # this file holds the name of the folder with the shards
TAG = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
STATE = "optimizer_state_dict"  # DeepSpeed's name of the optimizer's state in a shard
BASE_STATE = "base_optimizer_state"  # inside of that, in stages 1 and 2; in stage 3 it has the same name again
MOST_LETTERS = 60  # of a name in a message


class ZeroStepper:
    """
    A Stepper by DeepSpeed's engine, which reduces, clips and steps in one call.

    Accelerate's `backward` would also step. Calling the engine for each keeps the loop the same for all backends, and
    gradients can be read before the step.
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
        """Return the number since the last call."""
        taken, self.num_skipped = self.num_skipped, 0
        return taken

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Tell the engine whether a step follows this micro-batch."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Call the engine's backward without a division by the accumulation, which the loss has already."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, max_grad_norm: float) -> torch.Tensor | float:
        """Reduce, clip, step and reset the gradients; the engine clips to the norm in its own configuration."""
        self.engine.step()
        self.optimizer.step()  # does nothing, but the schedule warns if it was not called
        self.num_skipped += self.was_skipped
        norm: torch.Tensor | float | None = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def zero_grad(self) -> None:
        """Do nothing: the engine has reset them."""


class Zero:
    """The backend of DeepSpeed's ZeRO, stages 1, 2 and 3; stage 3 partitions the weights too."""

    def __init__(self, accelerator: Accelerator) -> None:
        from deepspeed.utils import groups

        self.accelerator = accelerator
        groups._WORLD_GROUP = None  # a copy of an earlier run's, in the same process, which is closed
        if self.is_sharded:
            wait_for_each_gather()

    @property
    def zero_stage(self) -> int:
        """The stage that the launch config asks for."""
        return int(self.accelerator.deepspeed_plugin.zero_stage)

    @property
    def is_sharded(self) -> bool:
        """Whether weights are partitioned."""
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
        """Collective: return the model, partitioned in stage 3, else whole on its device."""
        prepared: torch.nn.Module
        if self.is_sharded:
            fill_config(self.accelerator, size)
            prepared = self.accelerator.prepare(model)
        else:
            prepared = self.accelerator.prepare_model(model, evaluation_mode=True)
        return prepared

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Collective: return copies on rank zero in stage 3, else the tensors themselves."""
        if self.is_sharded:
            return whole_on_first(tensors)
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def save_optimizer(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, step: int) -> OptimizerFiles:
        """Local: return the function that lets DeepSpeed's engine write its shards."""
        return OptimizerFiles(write_shards=partial(save_shards, model, step=step))

    def load_optimizer(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, files: Mapping[str, Any]
    ) -> None:
        """Collective: let DeepSpeed's engine read its shards."""
        load_shards(model, folder, lambda error: agree(self.accelerator, error))

    def gradient_function(self) -> Callable[[torch.nn.Parameter], torch.Tensor | None]:
        """Return DeepSpeed's function, which is collective. Raises ConfigError for fp16, whose gradients are scaled."""
        if self.accelerator.mixed_precision == "fp16":
            raise ConfigError(
                "--wandb_watch does not see fp16's gradients under DeepSpeed; use --bf16, or leave it out."
            )
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad  # type: ignore[no-any-return]

    def writers_agreement(self) -> Callable[[BaseException | None], str | None]:
        """Return the agreement of rank zero: the engine's shards are written earlier, by the main threads."""
        return no_agreement


def wait_for_each_gather() -> None:
    """
    Local: let DeepSpeed gather parameters one after the other where it gathers several at once, and does not train.

    It begins all of them and waits for the last alone. NCCL ends them in their order; gloo's threads may still be
    filling the others: whoever reads them, a save or the next forward, would find what was in the memory before.
    """
    if torch.distributed.get_backend() == "nccl":
        return
    from deepspeed.runtime.zero import Init

    def gather(init: Any, parameters: list[Any], hierarchy: int | None = 0, **_: bool) -> None:
        init._allgather_params_sequential(parameters, hierarchy)  # which treats quantized ones by itself

    Init._allgather_params_coalesced = gather


def fill_config(accelerator: Accelerator, size: StepSize) -> None:
    """
    Fill from our flags what DeepSpeed's configuration leaves `auto` or out; call it before `prepare`.

    Raises ConfigError where the configuration and a flag differ.
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
    # A torch optimizer works on the CPU as well; DeepSpeed's own would have to be compiled.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    accelerator.gradient_accumulation_steps = size.accumulation  # else accelerate warns that the two differ
    if stage == 3:
        # DeepSpeed calls torch by older names, some of them at each step.
        warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
        from transformers.integrations import HfDeepSpeedConfig

        # It tells Transformers that ranks have to generate together; the plugin keeps the reference.
        accelerator.deepspeed_plugin.dschf = HfDeepSpeedConfig(config)


def save_shards(engine: Any, folder: Path, *, step: int) -> None:
    """
    Collective: each rank writes its part of the optimizer's state, rank zero the module's, as the Trainer does.

    With an adapter frozen weights are left out. An error of writing is raised on this rank only, after all ranks are
    done: raised inside of DeepSpeed it would leave the others waiting.
    """
    failures: list[Exception] = []

    def write(state_dict: Any, path: str) -> None:  # DeepSpeed also passes these as keywords
        try:
            torch.save(state_dict, path)
        except Exception as error:  # torch has its own error types for a full disk
            failures.append(error)

    tag = f"global_step{step}"
    files = engine.checkpoint_engine
    # DeepSpeed's conversion scripts are left out: model.safetensors holds the weights.
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


def load_shards(engine: Any, folder: Path, agree: Callable[[BaseException | None], str | None]) -> None:
    """
    Collective: load what `save_shards` wrote, on as many ranks, once all ranks `agree` that theirs can be loaded.

    DeepSpeed would unpickle whatever is in the files; here anything but tensors and plain values raises ConfigError,
    and so does a state of the optimizer that does not fit.
    """
    failure: ConfigError | None = None
    try:
        _check_shard(engine, folder)
    except ConfigError as error:  # told to the other ranks: they would wait inside of DeepSpeed
        failure = error
    if (message := agree(failure)) is not None:
        raise ConfigError(message) from failure
    files = engine.checkpoint_engine
    files.load = load_shard
    try:
        strict = not _is_peft_model(engine.module)  # frozen weights are not in it
        loaded, _ = engine.load_checkpoint(str(folder), load_module_strict=strict, load_lr_scheduler_states=False)
    except Exception as error:  # whatever it meets in a file that is damaged
        raise ConfigError(f"{folder} can't be loaded by DeepSpeed: {type(error).__name__} {error}") from error
    finally:
        del files.load
    if loaded is None:
        raise ConfigError(f"{folder} holds no state of DeepSpeed's; use the launch config that it was saved with.")


def shards_of(folder: Path) -> Path | None:
    """
    Return the folder with DeepSpeed's shards in a checkpoint, None of one without.

    Raises ConfigError if the file that names it names anything but a folder in the checkpoint.
    """
    file = folder / LATEST_FILE
    if not file.is_file():
        return None
    try:
        tag = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{LATEST_FILE} can't be read: {error}") from error
    if not TAG.fullmatch(tag) or not (folder / tag).is_dir():
        raise ConfigError(f"{LATEST_FILE} names {tag[:MOST_LETTERS]!r}, which is no folder of shards in the checkpoint")
    return folder / tag


def _check_shard(engine: Any, folder: Path) -> None:
    """Local: raise ConfigError unless this rank's state of the optimizer has the shapes that the engine's has now."""
    shards = shards_of(folder)
    if shards is None:
        return  # refused by who loads
    name = Path(engine._get_zero_ckpt_name(str(folder), shards.name)).name
    content = load_shard(str(shards / name), "cpu", mmap=True)
    saved = content.get(STATE) if isinstance(content, dict) else None
    if not isinstance(saved, dict):
        raise ConfigError(f"{name} holds no state of the optimizer")
    own = engine.optimizer.state_dict()
    for key in own:
        fault = "not there" if key not in saved else why_unlike(own[key], saved[key])
        if fault is not None:
            raise ConfigError(f"{folder}: {key} in {name} is {fault}; it is of another model or launch, or damaged.")
    try:
        _check_base(engine.optimizer, saved)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder}: {name} does not fit the optimizer ({error}); it is damaged.") from error


def _check_base(zero: Any, saved: Mapping[str, Any]) -> None:
    """Raise ValueError unless the state of the optimizer inside of ZeRO's has the sizes of this rank's flat pieces."""
    gives = hasattr(zero, "_set_fp32_optimizer_param_groups")  # stage 3 lends it the pieces for each step
    state = saved[STATE if gives else BASE_STATE]
    if gives:
        zero._set_fp32_optimizer_param_groups()
    try:
        pieces = [piece for group in zero.optimizer.param_groups for piece in group["params"]]
        check_optimizer_file(BASE_STATE, state)
        check_state(zero.optimizer, [state])
    finally:
        if gives:
            zero._clear_fp32_optimizer_param_groups()
    for index, values in state["state"].items():  # whatever optimizer it is: it works on each number by itself
        for what, value in values.items():
            if isinstance(value, torch.Tensor) and value.numel() not in (1, pieces[index].numel()):
                raise ValueError(f"{what} of piece {index} has {value.numel()} numbers, not {pieces[index].numel()}")


def load_shard(path: str, map_location: Any = None, *, mmap: bool = False) -> Any:
    """Read one of DeepSpeed's files: tensors, plain values and a few of its own classes. Raises ConfigError."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    records = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    return load_safely(path, map_location, records, mmap=mmap)
