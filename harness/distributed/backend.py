"""
How model and optimizer lie on the ranks, and what hangs on it: to prepare, to step, to save, to load.

There are three: whole on each rank (replicated.py), in shards of FSDP2 (fsdp2.py), divided by DeepSpeed's ZeRO
(zero.py). `choose_backend` (accelerator.py) tells them apart; nobody else does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer

from harness.distributed.launch import where
from harness.errors import ConfigError

OPTIMIZER_FILE = "optimizer.pt"


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """What the flags say of an optimizer step: samples of a micro-batch, micro-batches, and where it is clipped."""

    batch_size: int
    accumulation: int
    max_grad_norm: float


@dataclass(frozen=True, kw_only=True)
class OptimizerFiles:
    """
    What is to be written of an optimizer: by rank zero `files`, by each rank its `rank_files`, torch states by name.

    `write_shards` is collective: ranks write into a folder together, before the training goes on.
    """

    files: Mapping[str, Any] = field(default_factory=dict)
    rank_files: Mapping[str, Any] = field(default_factory=dict)
    write_shards: Callable[[Path], None] | None = None


class Stepper(Protocol):
    """What `train_step` is made of, on all ranks: the micro-batches of a step, then the step."""

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, as for fp16: then steps may be skipped."""
        ...

    @property
    def was_skipped(self) -> bool:
        """Whether the last step is none for the schedule, since gradients overflowed."""
        ...

    def take_skipped(self) -> int:
        """How many steps have changed nothing since it was asked last; reads the device if the loss is scaled."""
        ...

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """A context for forward and backward of a micro-batch; gradients are reduced over the ranks by the last one."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar to those of the step."""
        ...

    def step(self, max_grad_norm: float) -> torch.Tensor | float:
        """Clip and step; returns the norm of the gradients before clipping. A limit of 0 clips nothing."""
        ...

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...


class Backend(Protocol):
    """One of the three ways. It keeps nothing of what it prepares: model and optimizer are given to it."""

    accelerator: Accelerator

    @property
    def is_sharded(self) -> bool:
        """Whether a rank holds a part of the weights only: it takes all ranks to run the model, or to save it."""
        ...

    @property
    def zero_stage(self) -> int:
        """The stage of ZeRO, 0 without DeepSpeed: a checkpoint is gone on from under the same."""
        ...

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, size: StepSize
    ) -> tuple[torch.nn.Module, AcceleratedOptimizer, Stepper]:
        """Collective: model and optimizer, wrapped for a training, and what makes its steps. Raises ConfigError."""
        ...

    def prepare_for_evaluation(self, model: torch.nn.Module, size: StepSize) -> torch.nn.Module:
        """Collective: the model, wrapped as far as an evaluation without a training needs it. Raises ConfigError."""
        ...

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Collective: a model's tensors whole; if it is sharded, as copies in host memory, on rank zero alone."""
        ...

    def save_optimizer(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, step: int) -> OptimizerFiles:
        """Local: what a checkpoint holds of the optimizer, of `step` optimizer steps; `model` is the wrapped one."""
        ...

    def load_optimizer(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, files: Mapping[str, Any]
    ) -> None:
        """
        Collective: take back what `save_optimizer` gave, from a checkpoint's folder; `files` of it are read already.

        Raises ConfigError, or ValueError, KeyError or RuntimeError for the state of another optimizer.
        """
        ...

    def gradient_function(self) -> Callable[[torch.nn.Parameter], torch.Tensor | None] | None:
        """
        Local: what gives, collectively, a parameter's whole gradient between the last backward of a step and the step.

        None where that is the parameter's `grad`. Raises ConfigError where gradients can't be seen.
        """
        ...

    def writers_agreement(self) -> Callable[[BaseException | None], str | None]:
        """
        Collective: what makes writers' threads agree, while their main threads do something else: see `ranks.agree`.

        It does nothing where rank zero is the one writer.
        """
        ...


def no_agreement(error: BaseException | None) -> None:
    """What rank zero needs to agree with itself."""


def check_wrapped(model: torch.nn.Module, wrapper: type[torch.nn.Module], kind: DistributedType) -> None:
    """
    See that `prepare` has made a model part of what the launch says; raises ConfigError.

    Accelerate leaves a model as it is that has nothing to train or lies on several devices: with several processes
    each would then train a copy of its own.
    """
    found = getattr(model, "_orig_mod", model)  # torch.compile's
    if not isinstance(found, wrapper):
        trainable = sum(parameter.requires_grad for parameter in found.parameters())
        raise ConfigError(
            f"distributed_type: {kind.value} should have made the model part of a {wrapper.__name__}, but it is a bare "
            f"{type(found).__name__} with {trainable} parameters to train: each process would train a copy of its "
            "own. Give the model parameters to train and place it on one device, or start one process: change "
            f"{where('num_processes')}."
        )
