"""Backward and optimizer step: as Accelerate wraps them, or as DeepSpeed's engine does them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import is_deepspeed_available
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from harness.distributed.launch import where
from harness.errors import ConfigError

# What `prepare` has to make of a model.
DDP_TYPES = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


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

    def micro_batch(self, *, is_last: bool) -> Any:
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


class AcceleratedStepper:
    """On one device, with DDP or FSDP2, in the Trainer's order."""

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, optimizer: AcceleratedOptimizer) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.num_skipped: torch.Tensor | int = 0

    @property
    def scales_loss(self) -> bool:
        """Whether accelerate has a loss scaler."""
        return self.accelerator.scaler is not None

    @property
    def was_skipped(self) -> bool:
        """
        Whether accelerate says that the loss scaler has skipped the last step, for the schedule as in the Trainer.

        It does not see what a fused optimizer skips by itself.
        """
        return bool(self.accelerator.optimizer_step_was_skipped)

    def take_skipped(self) -> int:
        """All of them, a fused optimizer's too."""
        taken, self.num_skipped = int(self.num_skipped), 0
        return taken

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Without a reduction over the ranks, unless it is the last one, or gradients are sharded."""
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        # FSDP2 would keep whole gradients on each device until then: what it is taken for is memory.
        reduces = is_last or self.accelerator.is_fsdp2
        with nullcontext() if reduces else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Accelerate's, with its loss scaler."""
        self.accelerator.backward(loss)

    def step(self, max_grad_norm: float) -> torch.Tensor | float:
        """Clip over all parameters in the model's order, then step."""
        limit = max_grad_norm or float("inf")
        norm: torch.Tensor | float = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # the same on all ranks already
        if (scaler := self.accelerator.scaler) is None:
            self.optimizer.step()
            return norm
        one = torch.ones((), device=self.accelerator.device)
        scale = scaler.scale(one)
        self.optimizer.step()
        self.num_skipped = self.num_skipped + (scaler.scale(one) < scale)  # on the device: only an overflow lowers it
        return norm

    def zero_grad(self) -> None:
        """Of the model: frozen parameters have none."""
        self.model.zero_grad()


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

    def step(self, max_grad_norm: float) -> torch.Tensor | float:  # noqa: ARG002 - in the engine's configuration
        """Reduce, clip, step and forget the gradients; the limit is that of the engine's configuration."""
        self.engine.step()
        self.optimizer.step()  # does nothing; the schedule warns unless it was called
        self.num_skipped += self.was_skipped
        norm: torch.Tensor | float | None = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def zero_grad(self) -> None:
        """The engine has done it."""


def check_wrapped(model: torch.nn.Module, kind: DistributedType) -> None:
    """
    See that `prepare` has wrapped a model as the launch says; raises ConfigError.

    Accelerate leaves a model as it is that has nothing to train or lies on several devices: with several processes
    each would then train a copy of its own.
    """
    wrapped = getattr(model, "_orig_mod", model)  # torch.compile's
    if kind in DDP_TYPES:
        is_right, wanted = isinstance(wrapped, DistributedDataParallel), "DistributedDataParallel"
    elif kind == DistributedType.DEEPSPEED and is_deepspeed_available():
        from deepspeed import DeepSpeedEngine

        is_right, wanted = isinstance(wrapped, DeepSpeedEngine), "DeepSpeed's engine"
    else:
        return
    if not is_right:
        trainable = sum(parameter.requires_grad for parameter in wrapped.parameters())
        raise ConfigError(
            f"distributed_type: {kind.value} should have made the model part of {wanted}, but it is a bare "
            f"{type(wrapped).__name__} with {trainable} parameters to train: each process would train a copy of its "
            "own. Give the model parameters to train and place it on one device, or start one process: change "
            f"{where('num_processes')}."
        )
