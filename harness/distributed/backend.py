"""
The interface of a backend: how model and optimizer are spread over the ranks, prepared, stepped, saved and loaded.

There are three: whole on each rank (replicated.py), in shards of FSDP2 (fsdp2.py), partitioned by DeepSpeed's ZeRO
(zero.py). `choose_backend` (accelerator.py) selects one; other code does not ask which it is.
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
    """
    The size of an optimizer step: samples a micro-batch, micro-batches a step, and the norm to clip gradients to.

    With `is_reduced_late` no backward pass reduces gradients: the caller does it once all ranks have made theirs.
    """

    batch_size: int
    accumulation: int
    max_grad_norm: float
    is_reduced_late: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimizerFiles:
    """
    The optimizer's part of a checkpoint: torch states by file name, `files` by rank zero, `rank_files` by each rank.

    `write_shards` is collective: ranks write into a folder together, before the training goes on.
    """

    files: Mapping[str, Any] = field(default_factory=dict)
    rank_files: Mapping[str, Any] = field(default_factory=dict)
    write_shards: Callable[[Path], None] | None = None


class Stepper(Protocol):
    """The operations that `train_step` consists of, on all ranks: each micro-batch of a step, then the step."""

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, as for fp16: then steps may be skipped."""
        ...

    @property
    def was_skipped(self) -> bool:
        """Whether the last step does not count for the schedule, because gradients overflowed."""
        ...

    def take_skipped(self) -> torch.Tensor | int:
        """Return how many steps were skipped since the last call, the same on all ranks; it may be on the device."""
        ...

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Return a context for forward and backward of a micro-batch; the last one reduces gradients over the ranks."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar to those of the step."""
        ...

    def step(self, max_grad_norm: float) -> torch.Tensor | float:
        """Clip and step; returns the norm of the gradients before clipping. A limit of 0 clips nothing."""
        ...

    def zero_grad(self) -> None:
        """Reset the gradients."""
        ...


class Backend(Protocol):
    """One of the three backends. It keeps no reference to what it prepares: model and optimizer are passed to it."""

    accelerator: Accelerator

    @property
    def is_sharded(self) -> bool:
        """Whether a rank holds only a part of the weights: running or saving the model then takes all ranks."""
        ...

    @property
    def zero_stage(self) -> int:
        """The stage of ZeRO, 0 without DeepSpeed; a checkpoint is resumed under the same stage."""
        ...

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, size: StepSize
    ) -> tuple[torch.nn.Module, AcceleratedOptimizer, Stepper]:
        """Collective: return model and optimizer, wrapped for a training, and their Stepper. Raises ConfigError."""
        ...

    def prepare_for_evaluation(self, model: torch.nn.Module, size: StepSize) -> torch.nn.Module:
        """
        Collective: return the model, wrapped as far as an evaluation without a training needs it.

        Raises ConfigError.
        """
        ...

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Collective: return a model's whole tensors; if it is sharded, as copies in host memory on rank zero only."""
        ...

    def save_optimizer(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, step: int) -> OptimizerFiles:
        """
        Local: return the optimizer's part of a checkpoint after `step` optimizer steps.

        `model` is the wrapped one.
        """
        ...

    def load_optimizer(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, files: Mapping[str, Any]
    ) -> None:
        """
        Collective: load what `save_optimizer` returned, from a checkpoint's folder; its `files` have been read already.

        Raises ConfigError, or ValueError, KeyError or RuntimeError for the state of another optimizer.
        """
        ...

    def gradient_function(self) -> Callable[[torch.nn.Parameter], torch.Tensor | None] | None:
        """
        Local: return a collective function from a parameter to its whole gradient, to call between backward and step.

        None where that is the parameter's `grad`. Raises ConfigError where gradients can't be read.
        """
        ...

    def writers_agreement(self) -> Callable[[BaseException | None], str | None]:
        """
        Collective: return a function like `ranks.agree` for the writers' threads, independent of the main threads.

        It does nothing where only rank zero writes.
        """
        ...


def no_agreement(error: BaseException | None) -> None:
    """Return None: the agreement where rank zero writes alone."""


def check_wrapped(model: torch.nn.Module, wrapper: type[torch.nn.Module], kind: DistributedType) -> None:
    """
    Check that `prepare` has wrapped a model as the launch says; raises ConfigError.

    Accelerate does not wrap a model that has nothing to train or lies on several devices: with several processes each
    would then train its own copy.
    """
    found = getattr(model, "_orig_mod", model)  # behind torch.compile
    if not isinstance(found, wrapper):
        trainable = sum(parameter.requires_grad for parameter in found.parameters())
        raise ConfigError(
            f"distributed_type: {kind.value} should have made the model part of a {wrapper.__name__}, but it is a bare "
            f"{type(found).__name__} with {trainable} parameters to train: each process would train a copy of its "
            "own. Give the model parameters to train and place it on one device, or start one process: change "
            f"{where('num_processes')}."
        )
