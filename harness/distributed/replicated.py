"""The backend that keeps model and optimizer whole on each rank: one device, or DDP on several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DynamoBackend
from torch.nn.parallel import DistributedDataParallel

from harness.distributed.backend import OPTIMIZER_FILE, OptimizerFiles, Stepper, StepSize, check_wrapped, no_agreement
from harness.distributed.optimizer_shards import (
    has_optimizer_shards,
    load_optimizer,
    load_whole_optimizer,
    read_optimizer,
)
from harness.distributed.ranks import ranks_of
from harness.distributed.sharding import joined

# The kinds of launch for which `prepare` has to wrap a model in DDP.
DDP_TYPES = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# Modes of torch.compile's own backend, inductor.
CUDAGRAPH_MODES = ("reduce-overhead", "max-autotune")


def uses_cudagraphs(accelerator: Accelerator) -> bool:
    """
    Whether torch.compile replays CUDA graphs, by the flags or by the launch config.

    A replay overwrites what the one before has returned, and so the first gradients of a step, which autograd takes
    over without a copy. Torch's advice, zeros as gradients beforehand, would let weights that have none decay. Its
    `cudagraph_mark_step_begin` is not needed where each forward pass has a backward pass, and once called it is needed
    before every forward pass, of evaluations too.
    """
    if accelerator.device.type != "cuda":
        return False
    plugin = accelerator.state.dynamo_plugin
    replays = plugin.backend == DynamoBackend.INDUCTOR and plugin.mode in CUDAGRAPH_MODES
    return bool(replays or plugin.backend == DynamoBackend.CUDAGRAPHS)


class AcceleratedStepper:
    """
    A Stepper by Accelerate's backward and step, in the Trainer's order.

    With `reduces_each` every micro-batch reduces its gradients over the ranks, not only the last one of a step; with
    `reduces_none` the caller reduces those of the step. With `copies_gradients` they are kept apart from the memory in
    which the next micro-batch's backward is computed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: AcceleratedOptimizer,
        *,
        reduces_each: bool = False,
        reduces_none: bool = False,
        copies_gradients: bool = False,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.reduces_each, self.reduces_none, self.copies_gradients = reduces_each, reduces_none, copies_gradients
        self._copies: dict[torch.nn.Parameter, torch.Tensor] = {}
        self.num_skipped: torch.Tensor | int = 0
        self._has_stepped = False

    @property
    def scales_loss(self) -> bool:
        """Whether accelerate has a loss scaler."""
        return self.accelerator.scaler is not None

    @property
    def was_skipped(self) -> bool:
        """
        Whether the loss scaler has skipped the last step according to accelerate, as the Trainer tells the schedule.

        It misses the steps that a fused optimizer skips by itself.
        """
        return bool(self.accelerator.optimizer_step_was_skipped)

    def take_skipped(self) -> torch.Tensor | int:
        """Return the number since the last call, with those that a fused optimizer skipped; on the device."""
        taken, self.num_skipped = self.num_skipped, 0
        return taken

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Return a context without a reduction over the ranks, unless it is the last micro-batch or each reduces."""
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        reduces = not self.reduces_none and (is_last or self.reduces_each)
        with nullcontext() if reduces else self.accelerator.no_sync(self.model):
            yield
        if self.copies_gradients and not is_last:
            self._copy_gradients()

    def _copy_gradients(self) -> None:
        # Once a step: what follows is added to the copies in place.
        for parameter in self.model.parameters():
            if parameter.grad is not None and parameter.grad is not self._copies.get(parameter):
                parameter.grad = self._copies[parameter] = parameter.grad.clone()

    def backward(self, loss: torch.Tensor) -> None:
        """Call Accelerate's backward, which applies its loss scaler."""
        self.accelerator.backward(loss)

    def step(self, max_grad_norm: float) -> torch.Tensor | float:
        """Clip over all parameters in the model's order, then step."""
        limit = max_grad_norm or float("inf")
        norm: torch.Tensor | float = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = joined(norm) if isinstance(norm, torch.Tensor) else norm  # already reduced: equal on all ranks
        if (scaler := self.accelerator.scaler) is None:
            self._step_unscaled()
            return norm
        one = torch.ones((), device=self.accelerator.device)
        scale = scaler.scale(one)
        self.optimizer.step()
        self.num_skipped = self.num_skipped + (scaler.scale(one) < scale)  # only an overflow lowers the scale
        return norm

    def _step_unscaled(self) -> None:
        # Accelerate's wrapper steps what it wraps, but looks twice on disk for a package (lomo_optim) before: 0.1 ms
        # a step. Its first call tells the schedule that the optimizer was stepped before it.
        if self._has_stepped:
            self.optimizer.optimizer.step()
        else:
            self.optimizer.step()
            self._has_stepped = True

    def zero_grad(self) -> None:
        """Reset the gradients of the model, and so not those of frozen parameters."""
        self._copies.clear()
        self.model.zero_grad()


class Replicated:
    """The backend of one device and of DDP. It can also resume from FSDP2's shards."""

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
        """Collective: see Backend. Raises ConfigError if DDP has not wrapped the model."""
        wrapped, prepared = self.accelerator.prepare(model, optimizer)
        if (kind := self.accelerator.distributed_type) in DDP_TYPES:
            check_wrapped(wrapped, DistributedDataParallel, kind)
        stepper = AcceleratedStepper(
            self.accelerator,
            wrapped,
            prepared,
            reduces_none=size.is_reduced_late and self.accelerator.num_processes > 1,
            copies_gradients=uses_cudagraphs(self.accelerator),
        )
        return wrapped, prepared, stepper

    def prepare_for_evaluation(
        self,
        model: torch.nn.Module,
        size: StepSize,
    ) -> torch.nn.Module:
        """Local: return the model on its device, not wrapped by DDP."""
        prepared: torch.nn.Module = self.accelerator.prepare_model(model, evaluation_mode=True)
        return prepared

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Local: return the tensors themselves, detached."""
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def save_optimizer(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
    ) -> OptimizerFiles:
        """Local: return its state dict, in the Trainer's file."""
        return OptimizerFiles(files={OPTIMIZER_FILE: optimizer.state_dict()})

    def load_optimizer(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: Path,
        files: Mapping[str, Any],
    ) -> None:
        """Local: load from the Trainer's file, or from FSDP2's shards."""
        if has_optimizer_shards(folder):
            load_optimizer(optimizer, read_optimizer(folder, ranks=ranks_of(self.accelerator), is_sharded=False))
        else:
            load_whole_optimizer(optimizer, files[OPTIMIZER_FILE])

    def gradient_function(self) -> None:
        """Return None: the gradient is the parameter's `grad`."""

    def writers_agreement(self) -> Callable[[BaseException | None], str | None]:
        """Return the agreement of rank zero, which writes alone."""
        return no_agreement
