"""Find the largest micro-batch whose forward pass, backward pass and optimizer fit in memory, by trying it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32, gather_object, send_to_device
from torch.nn.modules.batchnorm import _BatchNorm

from harness.data.loader import TrainLoader
from harness.distributed.backend import Backend
from harness.distributed.flags import TopologyConfig
from harness.distributed.ranks import agree
from harness.errors import ConfigError, MemoryShortError, is_memory_short
from harness.fitting.longest import longest_samples
from harness.fitting.memory import HostPeak, free_on_host, release, trained_bytes
from harness.training import rng
from harness.training.flags import ModelingConfig
from harness.training.loss import Loss
from harness.training.weighing import BATCHES

FLAG = "--auto_find_batch_size"
# What a trial leaves free: a share of an accelerator's memory, and on the host the bytes of address space that threads
# of the training reserve, which count where that is limited. And the share of the host's free memory that one may take.
MARGIN, FOR_THREADS, OF_HOST = 0.02, 256 * 2**20, 0.9
DEPENDS = "the numbers depend on the size of a micro-batch"
CHOOSE = "choose one with --per_device_train_batch_size and --gradient_accumulation_steps"


def size_kept(saved: Mapping[str, Any], of_device: int, num_processes: int) -> int | None:
    """
    Return the size of the micro-batches in a checkpoint's manifest; None where the steps were others.

    `of_device` is the number of samples that a device has in a step.
    """
    data = saved.get("data")
    if not isinstance(data, Mapping) or data.get("num_processes") != num_processes:
        return None
    size, accumulation = data.get("per_device_train_batch_size"), data.get("gradient_accumulation_steps")
    fits = isinstance(size, int) and isinstance(accumulation, int) and size > 0 and size * accumulation == of_device
    return size if fits else None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is tried: a training's model before it is wrapped, its loss, its unused optimizer, and its data."""

    model: torch.nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    loader: TrainLoader

    @property
    def accelerator(self) -> Accelerator:
        """That of the training."""
        return self.loader.accelerator

    @property
    def of_device(self) -> int:
        """The number of samples that a device has in a step."""
        return self.loader.config.per_device_train_batch_size * self.loader.config.gradient_accumulation_steps

    def batch(self, samples: list[Any]) -> Mapping[str, Any]:
        """Return samples as a batch on the device."""
        batch: Mapping[str, Any] = send_to_device(self.loader.make.collate(samples), self.accelerator.device)
        return batch


def find_size(trial: Trial) -> int:
    """
    Collective: return the most samples in a micro-batch that fit on all ranks, a divisor of those of a step.

    Weights, buffers, modes, optimizer and generators are afterwards as they were. Raises ConfigError for a model whose
    numbers depend on how a batch is split, and MemoryShortError if not even one sample fits.
    """
    device = trial.accelerator.device
    if any(parameter.device.type != device.type for parameter in trial.model.parameters()):
        trial.model.to(device)  # where it is going to be trained
    with as_it_was(trial.model, trial.optimizer, device):
        samples = longest_samples(trial.loader, trial.of_device)
        _check_loss(trial, [samples[0], samples[-1]])
        found, failure = 0, None
        try:
            found = _Search(trial, samples).largest()
        except Exception as error:  # told to the other ranks, then raised
            failure = error
    message = agree(trial.accelerator, failure)
    if failure is not None:
        raise failure
    if message is not None:
        raise ConfigError(f"{FLAG} has failed on another rank: {message}")
    sizes: list[int] = gather_object([found])
    if (found := min(sizes)) == 0:
        raise MemoryShortError(
            "Out of memory: not even a micro-batch of one sample fits. Use --activation_checkpointing, --bf16, shorter "
            "samples, or an optimizer that keeps less (--optim adafactor)."
        )
    return found


def check_findable(model: torch.nn.Module, backend: Backend, modeling: ModelingConfig, ddp: TopologyConfig) -> None:
    """Raise ConfigError where the numbers of a training depend on its micro-batches, or nothing can be tried."""
    if modeling.loss_scaling == "trainer":
        raise ConfigError(
            f"{FLAG} with --loss_scaling=trainer: there the numbers depend on the size of a micro-batch; leave one of "
            "them out."
        )
    if backend.is_sharded or backend.zero_stage:
        what = f"DeepSpeed ZeRO-{backend.zero_stage}" if backend.zero_stage else "FSDP2"
        raise ConfigError(
            f"{FLAG} is not supported with {what}: a rank that runs out of memory would leave the others waiting for "
            f"its part of the weights; {CHOOSE}, or use launch_configs/ddp.yaml."
        )
    if ddp.ddp_static_graph:
        raise ConfigError(f"{FLAG} reduces gradients without DDP, so --ddp_static_graph does nothing; leave it out.")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise ConfigError(f"{FLAG}: {name} is a batch norm, so {DEPENDS}; {CHOOSE}.")


def _check_loss(trial: Trial, few: list[Any]) -> None:
    """Collective: raise ConfigError if the loss of a batch is no mean or sum over its samples or tokens."""
    learned = copy.copy(trial.loss)  # the training learns from its own first step
    if learned.learn(trial.model, [dict(trial.batch(few))]).by == BATCHES:
        raise ConfigError(f"{FLAG}: the loss of a batch is no mean or sum over its samples, so {DEPENDS}; {CHOOSE}.")


@contextmanager
def as_it_was(model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[None]:
    """
    Put all back at the end of the block that a step of an unused optimizer changes; the model has no gradients then.

    The weights that are trained are copied to host memory for it.
    """
    modes = {module: module.training for module in model.modules()}
    tensors = [*(each for each in model.parameters() if each.requires_grad), *model.buffers()]
    contents = [each.detach().to("cpu", copy=True) for each in tensors]
    settings = [copy.deepcopy({**group, "params": None}) for group in optimizer.param_groups]
    generators = {**rng.capture(device), "own": rng.capture_own(device)}
    try:
        yield
    finally:
        model.zero_grad()
        optimizer.state.clear()
        for group, before in zip(optimizer.param_groups, settings, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(before, params=parameters)
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for tensor, content in zip(tensors, contents, strict=True):
                tensor.copy_(content)
        rng.restore(generators, device)
        release()


@dataclass(kw_only=True)
class _Measured:
    """The host memory that a micro-batch of `size` samples has taken beside weights, gradients and optimizer."""

    size: int = 0
    grown: int = 0


@dataclass
class _Search:
    """The trials of a search, from the smallest micro-batch up; each takes what a step of the training takes."""

    trial: Trial
    samples: list[Any]  # as many as a step of a device has, those that take most memory first
    held: list[torch.Tensor] = field(default_factory=list)  # memory that the training takes and the trials don't
    measured: _Measured = field(default_factory=_Measured)

    def largest(self) -> int:
        """Return the largest size that fits; 0 if none does."""
        found, of_step = 0, len(self.samples)
        self.trial.model.train()
        if not self._fits(self._prepare):
            return 0
        for size in divisors(of_step):
            if self._is_hopeless(size) or not self._fits(lambda size=size: self._run(size)):  # type: ignore[misc]
                break
            found = size
        self.held.clear()
        return found

    def _fits(self, act: Callable[[], None]) -> bool:
        try:
            act()
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_memory_short(error):
                raise
        self.trial.model.zero_grad()
        release()  # the error and what it held are gone
        return False

    def _prepare(self) -> None:
        """Take what is there in each step beside activations: the optimizer's state, DDP's buckets, a margin."""
        device = self.trial.accelerator.device
        margin = FOR_THREADS  # never written to, so that it takes no memory of a host
        if device.type == "cuda":
            margin = int(torch.cuda.get_device_properties(device).total_memory * MARGIN)
        buckets = trained_bytes(self.trial.model) if self.trial.accelerator.num_processes > 1 else 0
        self.held.append(torch.empty(margin + buckets, dtype=torch.uint8, device=device))
        before = {name: buffer._version for name, buffer in self.trial.model.named_buffers()}
        self._run(1)
        for name, buffer in self.trial.model.named_buffers():
            if before.get(name, buffer._version) != buffer._version:
                raise ConfigError(f"{FLAG}: a forward pass changes {name}, so {DEPENDS}; {CHOOSE}.")
        optimizer: Any = self.trial.optimizer
        if hasattr(optimizer, "train"):  # as accelerate's wrapper does
            optimizer.train()
        optimizer.step()

    def _run(self, size: int) -> None:
        """Make forward and backward pass of a micro-batch; gradients of earlier ones are there, as in a step."""
        trial = self.trial
        accelerator, loss = trial.accelerator, trial.loss
        if size == len(self.samples):  # the only one of its step
            trial.model.zero_grad()
        with HostPeak() as peak:
            batch = trial.batch(self.samples[:size])
            items = None
            if loss.takes_num_items(batch):
                items = torch.as_tensor(loss.targets.count(batch), device=accelerator.device).clamp(min=1) / 1
            with accelerator.autocast():
                value, _ = loss.compute(self._model(), batch, items)
            value.backward()  # type: ignore[no-untyped-call]
        if peak.grown is not None and accelerator.device.type == "cpu":
            self.measured = _Measured(size=size, grown=peak.grown)

    def _model(self) -> Any:
        """The model as accelerate wraps it: mixed precision makes float32 of its outputs."""
        model: Any = self.trial.model
        return convert_outputs_to_fp32(model) if self.trial.accelerator.mixed_precision != "no" else model

    def _is_hopeless(self, size: int) -> bool:
        """Whether the host's memory can't be enough, by the last trial: the system would end this process."""
        last = self.measured
        return last.size > 0 and last.grown / last.size * size > free_on_host() * OF_HOST


def divisors(number: int) -> list[int]:
    """Return all divisors, the smallest first."""
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    return [*small, *(number // each for each in reversed(small) if each * each != number)]
