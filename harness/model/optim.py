"""Parameter groups, optimizer and learning rate schedule, as the Trainer makes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, ParallelMode

from harness.config import Json, arg, at_least, choice
from harness.errors import ConfigError

# Names of `--optim` that need another loop than ours, with what to use.
UNSUPPORTED_OPTIMIZERS = {
    "adamw_torch_xla": "XLA devices are not supported; use adamw_torch",
    "adamw_torch_npu_fused": "use adamw_torch_fused",
    "adamw_anyprecision": "torchdistx is no longer maintained; use adamw_torch",
    "lomo": "it updates weights inside the backward pass; use galore_adamw or adafactor",
    "adalomo": "it updates weights inside the backward pass; use galore_adamw or adafactor",
    "galore_adamw_layerwise": "it updates weights inside the backward pass; use galore_adamw",
    "galore_adamw_8bit_layerwise": "it updates weights inside the backward pass; use galore_adamw_8bit",
    "galore_adafactor_layerwise": "it updates weights inside the backward pass; use galore_adafactor",
    "apollo_adamw_layerwise": "it updates weights inside the backward pass; use apollo_adamw",
}
OPTIMIZERS = tuple(name.value for name in OptimizerNames if name.value not in UNSUPPORTED_OPTIMIZERS)
SCHEDULERS = tuple(name.value for name in SchedulerType)
# These are stepped with a metric after an evaluation, not after each update.
BY_METRIC = ("reduce_lr_on_plateau", "greedy")
NO_DECAY_PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule."""

    optim: str = arg("adamw_torch_fused", f"One of {', '.join(OPTIMIZERS)}.")
    optim_args: str | None = arg(help="Further arguments of the optimizer: key=value,key=value.")
    optim_target_modules: list[str] | None = arg(
        help="Modules that GaLore or APOLLO project: names, patterns, or all-linear.", nargs="+"
    )
    learning_rate: float = arg(5e-5, "Peak learning rate.")
    weight_decay: float = arg(0.0, "Weight decay, not on biases and norms.")
    adam_beta1: float = arg(0.9, "First beta of Adam-like optimizers.")
    adam_beta2: float = arg(0.999, "Second beta of Adam-like optimizers.")
    adam_epsilon: float = arg(1e-8, "Epsilon of Adam-like optimizers.")
    lr_scheduler_type: str = arg("linear", f"One of {', '.join(SCHEDULERS)}.")
    lr_scheduler_kwargs: Json | None = arg(help='JSON for the schedule: {"num_cycles": 2}.')
    warmup_steps: float = arg(0, "Steps of linear warmup; below 1: a share of all steps.")

    def __post_init__(self) -> None:
        if self.optim in UNSUPPORTED_OPTIMIZERS:
            raise ConfigError(f"--optim={self.optim} is not supported: {UNSUPPORTED_OPTIMIZERS[self.optim]}.")
        choice("optim", self.optim, OPTIMIZERS)
        choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULERS)
        at_least(
            0,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            adam_epsilon=self.adam_epsilon,
        )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name}={getattr(self, name)}: use 0 to below 1.")
        for mapping in (self.optim_args or "").replace(" ", "").split(","):
            if mapping and mapping.count("=") != 1:
                raise ConfigError(f"--optim_args={self.optim_args}: write key=value,key=value.")
        if self.optim_target_modules is not None and not self.optim.startswith(("galore", "apollo")):
            raise ConfigError(f"--optim_target_modules is for galore_* and apollo_*, not for --optim {self.optim}.")

    def num_warmup_steps(self, max_steps: int) -> int:
        """Optimizer steps of warmup: the number itself, or a share of all steps rounded up."""
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(max_steps * self.warmup_steps)


def decay_parameter_names(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: Trainer.get_decay_parameter_names."""
    return set(get_parameter_names(model, [torch.nn.LayerNorm], NO_DECAY_PATTERNS))


def build_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """
    The optimizer over two groups in the model's order: with and without weight decay.

    The classes and their arguments come from the Trainer's own table. Raises ConfigError for a package that is not
    installed or arguments that the optimizer does not take.
    """
    from transformers import Trainer  # not above: with WANDB_MODE=offline its import prints to standard output

    decay = decay_parameter_names(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: Any = [
        {"params": [p for name, p in trained if name in decay], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trained if name not in decay], "weight_decay": 0.0},
    ]
    args = SimpleNamespace(
        parallel_mode=ParallelMode.NOT_PARALLEL,  # read for the layerwise variants alone
        **{name: getattr(config, name) for name in OptimConfig.__dataclass_fields__},
    )
    targets = config.optim_target_modules
    args.optim_target_modules = targets[0] if targets and len(targets) == 1 else targets
    args.optim = OptimizerNames(config.optim)
    try:
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if is_optimizer_factory(cls):
            optimizer: torch.optim.Optimizer = cls()(model, **kwargs)
            return optimizer
        groups = kwargs.pop("params", groups)  # GaLore and APOLLO bring their own groups
        optimizer = cls(groups, **kwargs)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"--optim={config.optim}: {error}") from error
    if "bitsandbytes" in str(cls) and kwargs.get("optim_bits") == 8:
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _keep_embeddings_in_32_bits(model: torch.nn.Module) -> None:
    import bitsandbytes  # type: ignore[import-not-found, unused-ignore]

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int) -> Any:
    """The schedule over `max_steps` optimizer steps. Raises ConfigError for arguments that it does not take."""
    try:
        return get_scheduler(
            config.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=config.num_warmup_steps(max_steps),
            num_training_steps=max_steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--lr_scheduler_type={config.lr_scheduler_type} with --lr_scheduler_kwargs="
            f"{config.lr_scheduler_kwargs or {}}: {error}"
        ) from error


def current_learning_rate(scheduler: Any, optimizer: torch.optim.Optimizer, config: OptimConfig) -> float:
    """The learning rate of the first group. Those stepped by a metric don't keep it themselves."""
    by_metric = config.lr_scheduler_type in BY_METRIC
    return float(optimizer.param_groups[0]["lr"] if by_metric else scheduler.get_last_lr()[0])
