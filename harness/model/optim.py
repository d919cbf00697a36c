"""Make parameter groups, optimizer and learning rate schedule as the Trainer makes them."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import get_scheduler
from transformers.trainer_optimizer import (
    _OPTIMIZER_HANDLERS,
    OptimizerContext,
    _parse_optim_args,
    is_optimizer_factory,
)
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, ParallelMode

from harness.config import choice, together
from harness.errors import ConfigError
from harness.model.flags import BY_METRIC, UNSUPPORTED_OPTIMIZERS, OptimConfig

logger = logging.getLogger(__name__)

OPTIMIZERS = tuple(name.value for name in OptimizerNames if name.value not in UNSUPPORTED_OPTIMIZERS)
SCHEDULERS = tuple(name.value for name in SchedulerType)
# What --optim_args would say a second time.
OWN_FLAGS = {
    "lr": "--learning_rate",
    "weight_decay": "--weight_decay",
    "betas": "--adam_beta1 and --adam_beta2",
    "eps": "--adam_epsilon",
}
# What does nothing where a task makes the optimizer, and where it makes groups that all say it themselves.
OF_AN_OPTIMIZER = (
    *("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
)
FLAGS_OF_GROUPS = {
    "lr": ("learning_rate",),
    "weight_decay": ("weight_decay",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
}
NO_DECAY_PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


# How a step is computed, not what it computes.
IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")


def check_names(config: OptimConfig) -> None:
    """Raise ConfigError for an optimizer or a schedule that Transformers does not know."""
    names = (("optim", OPTIMIZERS), ("lr_scheduler_type", SCHEDULERS))
    together(partial(choice, flag, getattr(config, flag), allowed) for flag, allowed in names)


def decay_parameter_names(model: torch.nn.Module) -> set[str]:
    """Return the names of the parameters with weight decay, as Trainer.get_decay_parameter_names."""
    return set(get_parameter_names(model, [torch.nn.LayerNorm], NO_DECAY_PATTERNS))


def build_optimizer(model: torch.nn.Module, config: OptimConfig, made: Any = None) -> torch.optim.Optimizer:
    """
    Return the optimizer over two groups in the model's order: with and without weight decay.

    `made` are other groups, or the optimizer itself, as the task's build_optimizer returned them. The classes and their
    arguments come from the Trainer's own table. A state that is loaded into it keeps its numbers and takes this
    optimizer's implementation. Raises ConfigError for a package that is not installed, for arguments that the optimizer
    does not take, and for flags that would do nothing beside what the task has made.
    """
    if made is None:
        optimizer = _optimizer(model, config, None)
    elif isinstance(made, torch.optim.Optimizer):
        optimizer = made
        _refuse_without_effect(config, OF_AN_OPTIMIZER, "an optimizer")
    else:
        optimizer = _optimizer(model, config, _own_groups(made, config))
    if made is not None:
        _check_own(model, optimizer)
    optimizer.register_load_state_dict_pre_hook(_with_own_implementation)
    return optimizer


def name_of(config: OptimConfig, made: Any) -> str:
    """Return what a checkpoint says of the optimizer, since its state fits no other."""
    is_own = isinstance(made, torch.optim.Optimizer)
    return f"{type(made).__name__} of the task's build_optimizer" if is_own else config.optim


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError for an optimizer of the task's that goes by whole matrices, which ZeRO has not."""
    kinds = {each.__name__ for each in type(optimizer).__mro__}
    if found := kinds & {"Adafactor", "Muon", "Shampoo", "SparseAdam"}:
        raise ConfigError(
            f"The task's build_optimizer returned {type(optimizer).__name__}: {found.pop()} goes by the shapes of "
            "parameters, and DeepSpeed's ZeRO gives an optimizer flat pieces of them. Use a launch config without it, "
            "such as fsdp2.yaml or ddp.yaml."
        )
    if not type(optimizer).__module__.startswith("torch."):
        logger.info(
            "ZeRO gives %s flat pieces of the parameters: right for an optimizer that treats each number by itself.",
            type(optimizer).__name__,
        )


def _own_groups(made: Any, config: OptimConfig) -> list[dict[str, Any]]:
    """Return parameter groups with --weight_decay where they say none. Raises ConfigError."""
    start = "The task's build_optimizer returned"
    if not isinstance(made, list | tuple) or not all(isinstance(group, Mapping) for group in made):
        raise ConfigError(
            f"{start} a {type(made).__name__}: return a list of parameter groups, as in [{{'params': [...], 'lr': "
            "1e-4}], or a torch.optim.Optimizer."
        )
    if not made or not all("params" in group for group in made):
        raise ConfigError(f"{start} {'no parameter groups' if not made else 'a group without params'}.")
    for name, flags in FLAGS_OF_GROUPS.items():
        if all(name in group for group in made):
            _refuse_without_effect(config, flags, f"groups that all have their own {name}")
    return [{"weight_decay": config.weight_decay, **group} for group in made]


def _refuse_without_effect(config: OptimConfig, flags: Sequence[str], what: str) -> None:
    for flag in flags:
        value = getattr(config, flag)
        if value != type(config).__dataclass_fields__[flag].default:
            raise ConfigError(
                f"--{flag}={value} does nothing here: the task's build_optimizer returned {what}. Leave it out, or "
                "change the function."
            )


def _check_own(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError for an optimizer that the loop can't step, or that would train something else."""
    start = f"The task's build_optimizer returned {type(optimizer).__name__}"
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(f"{start}, whose step needs a closure: it computes losses itself, and this loop does that.")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    foreign = len(held - {id(parameter) for parameter in model.parameters()})
    if foreign or not held:
        what = f"{foreign} of its {len(held)} parameters are" if held else "its parameters are"
        raise ConfigError(f"{start}: {what} not of the model that the function was given.")
    left = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in held]
    if left:
        logger.info("%s: %d parameters are not in it and stay as they are, the first: %s.", start, len(left), left[0])


def _with_own_implementation(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """
    Return a state to load with this optimizer's own implementation in place of the one it was saved with.

    Torch places each `step` by it, on the device or on the CPU, and a fused optimizer has told the loss scaler so.
    """
    own, saved = optimizer.param_groups, state["param_groups"]
    if len(own) != len(saved):
        return state  # refused by load_state_dict
    groups = [
        {**group, **{name: mine[name] for name in IMPLEMENTATION if name in mine}}
        for mine, group in zip(own, saved, strict=True)
    ]
    return {**state, "param_groups": groups}


def _groups(model: torch.nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    decay = decay_parameter_names(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in trained if name in decay], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trained if name not in decay], "weight_decay": 0.0},
    ]


def _optimizer(model: torch.nn.Module, config: OptimConfig, own: Any) -> torch.optim.Optimizer:
    """Return the optimizer of --optim, over the task's `own` groups if it has some."""
    args = SimpleNamespace(
        parallel_mode=ParallelMode.NOT_PARALLEL,  # only read for layerwise optimizers
        **{name: getattr(config, name) for name in OptimConfig.__dataclass_fields__},
    )
    targets = config.optim_target_modules
    args.optim_target_modules = targets[0] if targets and len(targets) == 1 else targets
    args.optim = OptimizerNames(config.optim)
    try:
        # As Trainer.get_optimizer_cls_and_kwargs; importing that loads `datasets` and prints with WANDB_MODE=offline.
        adam = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
        given = _Given(_parse_optim_args(config.optim_args))
        context = OptimizerContext(args, model, {"lr": config.learning_rate}, adam, given)
        cls, kwargs = _OPTIMIZER_HANDLERS[args.optim](context)
        kwargs |= _further(given, cls, config)
        if own is not None and (is_optimizer_factory(cls) or "params" in kwargs):
            raise ValueError("it makes its own parameter groups, and the task's build_optimizer returned some")
        if is_optimizer_factory(cls):
            optimizer: torch.optim.Optimizer = cls()(model, **kwargs)
            return optimizer
        # GaLore and APOLLO make their own groups.
        groups = kwargs.pop("params", None) or own or _groups(model, config)
        optimizer = cls(groups, **kwargs)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"--optim={config.optim}: {error}") from error
    if "bitsandbytes" in str(cls) and kwargs.get("optim_bits") == 8:
        _keep_embeddings_in_32_bits(model)
    return optimizer


class _Given(dict[str, str]):
    """What --optim_args gives, and what the Trainer's table has read of it."""

    def __init__(self, values: Mapping[str, str]) -> None:
        super().__init__(values)
        self.all = frozenset(values)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, read."""
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key: str, default: Any = None) -> Any:
        """Return a value, read, and remove it."""
        self.read.add(key)
        return super().pop(key, default)

    def __getitem__(self, key: str) -> str:
        self.read.add(key)
        return super().__getitem__(key)


def _further(given: _Given, cls: Any, config: OptimConfig) -> dict[str, Any]:
    """
    Return as arguments of the optimizer what the Trainer's table has not read of --optim_args.

    Raises ConfigError for names that the optimizer does not take, and for those that have a flag of their own.
    """
    start = f"--optim_args={config.optim_args}"
    for name in given.all & OWN_FLAGS.keys():
        if name not in given.read or name == "weight_decay":  # which the parameter groups say
            raise ConfigError(f"{start}: for {name} there is {OWN_FLAGS[name]}.")
    takes = {} if is_optimizer_factory(cls) else dict(inspect.signature(cls).parameters)
    takes = {name: each for name, each in takes.items() if each.default is not each.empty and name not in OWN_FLAGS}
    found: dict[str, Any] = {}
    for name in sorted(given.all - given.read):
        if name not in takes or isinstance(takes[name].default, tuple):
            known = sorted({*(given.read - OWN_FLAGS.keys()), *takes} - {"params"})
            raise ConfigError(f"{start}: {config.optim} takes no {name}; it takes: {', '.join(known) or 'none'}.")
        found[name] = _as_typed(start, name, given[name], takes[name].default)
    return found


def _as_typed(start: str, name: str, text: str, default: Any) -> Any:
    """Return a value in the type of the default; where that is None, what JSON makes of it."""
    try:
        if isinstance(default, str):
            return text
        value = json.loads(text.lower())
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError("give true or false")
        if isinstance(default, int | float) and not isinstance(default, bool):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError("give a number")
            return float(value) if isinstance(default, float) else value
    except ValueError as error:
        raise ConfigError(f"{start}: {name}={text}: {error}.") from error
    return value


def _keep_embeddings_in_32_bits(model: torch.nn.Module) -> None:
    import bitsandbytes  # type: ignore[import-not-found, unused-ignore]

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int) -> Any:
    """Return the schedule over `max_steps` optimizer steps. Raises ConfigError for arguments that it does not take."""
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


@contextmanager
def flags_kept(optimizer: Any, scheduler: Any, names: Sequence[str]) -> Iterator[None]:
    """
    Load the states of optimizer and schedule inside: what the flags of these `names` gave them stays as it was.

    The learning rate is then the one that the schedule has at its step, from the flag's. Raises ConfigError for a
    schedule that does not follow from step and learning rate alone.
    """
    keys = [key for key, flags in FLAGS_OF_GROUPS.items() if not set(flags).isdisjoint(names)]
    keys += ["initial_lr"] if "lr" in keys else []
    if "lr" in keys and not hasattr(scheduler, "lr_lambdas"):
        raise ConfigError(
            f"--change_on_resume learning_rate: the rates of {type(scheduler).__name__} do not follow from the step; "
            "use another --lr_scheduler_type."
        )
    own = [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]
    rates = list(getattr(scheduler, "base_lrs", ()))
    yield
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
    if "lr" in keys:
        now = [rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)]
        scheduler.base_lrs, scheduler._last_lr = rates, now
        for group, rate in zip(optimizer.param_groups, now, strict=True):
            group["lr"] = rate


def current_learning_rate(scheduler: Any, optimizer: torch.optim.Optimizer, config: OptimConfig) -> float:
    """Return the first group's learning rate. A schedule that is stepped by a metric does not record it itself."""
    by_metric = config.lr_scheduler_type in BY_METRIC
    return float(optimizer.param_groups[0]["lr"] if by_metric else scheduler.get_last_lr()[0])
