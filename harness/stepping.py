"""Backward and optimizer step: as Accelerate wraps them, or as DeepSpeed's engine does them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.tensor import DTensor


class Stepper(Protocol):
    """What `train_step` is made of, on all ranks: the micro-batches of a step, then the step."""

    @property
    def was_skipped(self) -> bool:
        """Whether the last step changed nothing, since gradients overflowed."""
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

    @property
    def was_skipped(self) -> bool:
        """Whether the loss scaler has skipped the last step."""
        return bool(self.accelerator.optimizer_step_was_skipped)

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
        self.optimizer.step()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm  # the same on all ranks already

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

    @property
    def was_skipped(self) -> bool:
        """Whether the loss scaler has skipped the last step."""
        return not self.engine.was_step_applied()

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
        norm: torch.Tensor | float | None = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def zero_grad(self) -> None:
        """The engine has done it."""
