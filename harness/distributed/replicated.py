"""Whole on each rank: one device, or DDP on several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch.nn.parallel import DistributedDataParallel

from harness.distributed.backend import OPTIMIZER_FILE, OptimizerFiles, Stepper, StepSize, check_wrapped, no_agreement
from harness.distributed.optimizer_shards import has_optimizer_shards, load_optimizer, read_optimizer
from harness.distributed.ranks import ranks_of
from harness.distributed.sharding import joined

# What `prepare` has to make of a model.
DDP_TYPES = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class AcceleratedStepper:
    """
    Accelerate's backward and step, in the Trainer's order.

    `reduces_each`: gradients are reduced over the ranks by each micro-batch, not by the last one alone.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: AcceleratedOptimizer,
        *,
        reduces_each: bool = False,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.reduces_each = reduces_each
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
        """Without a reduction over the ranks, unless it is the last one or each reduces."""
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        with nullcontext() if is_last or self.reduces_each else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Accelerate's, with its loss scaler."""
        self.accelerator.backward(loss)

    def step(self, max_grad_norm: float) -> torch.Tensor | float:
        """Clip over all parameters in the model's order, then step."""
        limit = max_grad_norm or float("inf")
        norm: torch.Tensor | float = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = joined(norm) if isinstance(norm, torch.Tensor) else norm  # the same on all ranks already
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


class Replicated:
    """The backend of one device and of DDP. It goes on from shards of FSDP2, too."""

    is_sharded = False
    zero_stage = 0

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def prepare(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        size: StepSize,
    ) -> tuple[torch.nn.Module, AcceleratedOptimizer, Stepper]:
        """Collective: see Backend. Raises ConfigError if DDP has not taken the model."""
        wrapped, prepared = self.accelerator.prepare(model, optimizer)
        if (kind := self.accelerator.distributed_type) in DDP_TYPES:
            check_wrapped(wrapped, DistributedDataParallel, kind)
        return wrapped, prepared, AcceleratedStepper(self.accelerator, wrapped, prepared)

    def prepare_for_evaluation(
        self,
        model: torch.nn.Module,
        size: StepSize,
    ) -> torch.nn.Module:
        """Local: on its device, not wrapped by DDP."""
        prepared: torch.nn.Module = self.accelerator.prepare_model(model, evaluation_mode=True)
        return prepared

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Local: the tensors themselves, without their history."""
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def save_optimizer(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
    ) -> OptimizerFiles:
        """Local: its state dict, in the Trainer's file."""
        return OptimizerFiles(files={OPTIMIZER_FILE: optimizer.state_dict()})

    def load_optimizer(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: Path,
        files: Mapping[str, Any],
    ) -> None:
        """Local: from the Trainer's file, or from shards of FSDP2."""
        if has_optimizer_shards(folder):
            load_optimizer(optimizer, read_optimizer(folder, ranks=ranks_of(self.accelerator), is_sharded=False))
        else:
            optimizer.load_state_dict(files[OPTIMIZER_FILE])

    def gradient_function(self) -> None:
        """None: a parameter has its gradient."""

    def writers_agreement(self) -> Callable[[BaseException | None], str | None]:
        """Rank zero writes alone."""
        return no_agreement
