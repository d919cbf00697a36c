"""Throughput of the training: samples and tokens a second, device utilisation (MFU), time spent waiting for data."""

from __future__ import annotations

import inspect
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from harness.distributed.transfer import to_device
from harness.model.flops import Flops
from harness.training.flags import ThroughputConfig
from harness.training.weighing import Repeated, num_documents, num_tokens

T = TypeVar("T")
SPEED, MEMORY = "train/throughput", "train/memory"
# What is added up over the ranks.
WORK = ("samples", "tokens", "useful", "of_documents", "squared")

HALF = ("bf16", "fp16")
# Operations a second of one device, as torch counts devices, for dense matrices on the tensor cores with sums in
# float32, from the makers' data sheets. Names are matched whole: a card's relatives (H20, 4090 Laptop, a MIG
# slice) have other peaks.
PEAKS: tuple[tuple[str, tuple[str, ...], float], ...] = (
    (r"V100-SXM[23]-\d+GB", ("fp16",), 125e12),
    (r"V100-PCIE-\d+GB", ("fp16",), 112e12),
    (r"T4", ("fp16",), 65e12),
    (r"A10", HALF, 125e12),
    (r"A10G", HALF, 70e12),
    (r"L4", HALF, 121e12),
    (r"L40S", HALF, 362e12),
    (r"A100-(SXM4|PCIE|SXM)-(40|80)GB|A100 80GB PCIe", HALF, 312e12),
    (r"H100 80GB HBM3", HALF, 989e12),
    (r"H100 PCIe", HALF, 756e12),
    (r"H100 NVL|H200 NVL", HALF, 835e12),
    (r"H200", HALF, 989e12),
    (r"B200", HALF, 2250e12),
    (r"GeForce RTX 3090", HALF, 71e12),
    (r"GeForce RTX 4090", HALF, 165e12),
    (r"AMD Instinct MI250X", HALF, 191.5e12),  # torch counts each half of the card as a device
    (r"AMD Instinct MI300X", HALF, 1307e12),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return a device's peak for bf16 or fp16 by the name that torch gives it; None where it is not known."""
    name = re.sub(r"^(NVIDIA |Tesla )+", "", device_name)
    for pattern, precisions, peak in PEAKS:
        if precision in precisions and re.fullmatch(pattern, name):
            return peak
    return None


def precision_of(model: torch.nn.Module, mixed_precision: str) -> str:
    """Return the precision of the matrix products: the mixed precision, or else the type of the weights."""
    if mixed_precision != "no":
        return mixed_precision
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")


def reads_tokens(model: torch.nn.Module) -> bool:
    """Whether the main input is `input_ids`: elements of other inputs (pixels, sound) are no tokens."""
    name = getattr(model, "main_input_name", None)
    return name == "input_ids" if name is not None else "input_ids" in inspect.signature(model.forward).parameters


class Throughput:
    """
    Measures the work of the steps since the last report on all devices, and the time they took.

    The time is everything between two reports in this process, except what happens within `paused`: evaluations and
    saves (the part of a save that is written in the background runs beside the steps). Waiting for data, logging, and
    the warm-up of the first steps are included. After a restart the first window covers only what this attempt has done
    of it, which may be nothing: then all names are there, and their values are NaN.

    Samples are those in the batches, of packed rows the documents, which the device counts. Tokens are the elements of
    `input_ids`, padding included, since the device works on it; with another main input there are none. Useful are
    those whose labels count; what has no labels by token has none.

    mfu is what the model's documents take, by `flops` (see there), of the device's peak: padding, which a batch's
    attention_mask tells, is no work, and rows of position_ids that begin anew are several documents. mfu_6n is the
    common estimate by `flops_per_token`, 6 x parameters without embeddings (as in total_flos), of all tokens: without
    attention, padding included. It is 0 where the model can't count its parameters so; then there is none.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: ThroughputConfig,
        accelerator: Accelerator,
        *,
        flops_per_token: int,
        flops: Flops | None = None,
        has_targets: Callable[[], bool] = lambda: False,
    ) -> None:
        self.device, self.num_devices = accelerator.device, accelerator.num_processes
        self.counts_tokens, self.flops_per_token = reads_tokens(model), flops_per_token
        self._has_targets = has_targets
        self.on_cuda = self.device.type == "cuda"
        known = None
        if self.on_cuda:
            name = torch.cuda.get_device_name(self.device)
            known = peak_flops(name, precision_of(model, accelerator.mixed_precision))
        self.peak = known if config.peak_flops is None else config.peak_flops
        self.flops = flops if self.counts_tokens and self.peak is not None else None
        # On the device: tokens whose labels count; those of documents, and the sum of the documents' squared lengths.
        self._useful = torch.zeros((), dtype=torch.int64, device=self.device)
        self._documents = torch.zeros(2, dtype=torch.int64, device=self.device)
        self._waits: deque[tuple[Any, Any]] = deque()
        self.begin()

    def begin(self) -> None:
        """Start a window now."""
        self._began_at, self._paused_seconds = time.perf_counter(), 0.0
        self._samples: torch.Tensor | int = 0
        self._tokens = 0
        self._wait_seconds = 0.0
        self._useful.zero_()
        self._documents.zero_()

    def add(self, batch: Mapping[str, Any], *, targets: torch.Tensor | None = None) -> None:
        """Count a micro-batch of this rank, `targets` of whose tokens have a label that counts; no host sync."""
        if isinstance(batch, Repeated):
            return
        tokens = batch.get("input_ids") if self.counts_tokens else None
        if tokens is not None:
            self._tokens += tokens.numel()
            self._samples += num_documents(batch) if holds_documents(tokens, batch) else tokens.shape[0]
            self._add_on_device(tokens, batch, targets)
            return
        shapes = (value.shape for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim > 0)
        self._samples += next(shapes, (0,))[0]

    def _add_on_device(self, tokens: torch.Tensor, batch: Mapping[str, Any], targets: torch.Tensor | None) -> None:
        if targets is not None:
            self._useful.add_(targets)
        if self.flops is not None:
            self._documents.add_(documents_in(tokens, batch))

    def drawn(self, windows: Iterator[T]) -> Iterator[T]:
        """
        Yield the same windows of batches, and measure the time in which each is drawn.

        On the CPU that is the time of the draw. A GPU has its own clock, and often work left that the draw does not
        hold up: there it is the time in which the GPU was idle, measured by events without waiting for it.
        """
        while True:
            began = self._mark()
            window = next(windows, None)
            self._waits.append((began, self._mark()))
            self._fold_waits()
            if window is None:
                return
            yield window

    def _mark(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _fold_waits(self) -> None:
        # Query the events without waiting. Those that the GPU has not reached yet count in the next report.
        while self._waits and not (self.on_cuda and not self._waits[0][1].query()):
            began, ended = self._waits.popleft()
            self._wait_seconds += began.elapsed_time(ended) / 1000 if self.on_cuda else ended - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block, which is no training. Waits for the device, which such work does anyway."""
        torch.get_device_module(self.device).synchronize()
        started = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - started

    def values(self) -> dict[str, torch.Tensor | float]:
        """
        Return what this rank has worked on, its seconds without data and peak memory in GiB, for a report to gather.

        No host sync.
        """
        self._fold_waits()
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.on_cuda else 0.0
        work: dict[str, torch.Tensor | float] = {"samples": self._samples, "tokens": self._tokens}
        if self.counts_tokens:
            work["useful"] = self._useful.clone()
        if self.flops is not None:
            work["of_documents"], work["squared"] = self._documents.clone().unbind()
        return {**work, "wait_seconds": self._wait_seconds, "peak_gib": peak}

    def report(self, of_ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """
        Return the window's values by name, and begin the next window; call it when the device is done.

        `of_ranks` are the `values` of all ranks. Each step waits for the rank that waits longest for data, so that
        rank's share is shown; of the memory the largest peak since the process began, evaluations included.
        """
        seconds = time.perf_counter() - self._began_at - self._paused_seconds
        self.begin()
        work = {name: sum(each.get(name, 0) for each in of_ranks) for name in WORK}
        waited, peak = (max(values[name] for values in of_ranks) for name in ("wait_seconds", "peak_gib"))
        worked = work["samples"] > 0 and seconds > 0
        rate = 1 / seconds if worked else math.nan
        found = {f"{SPEED}/samples_per_second": work["samples"] * rate}
        if self.counts_tokens and (work["tokens"] > 0 or not worked):
            found[f"{SPEED}/tokens_per_second"] = work["tokens"] * rate
            if self._has_targets():
                found[f"{SPEED}/useful_tokens_per_second"] = work["useful"] * rate
        found |= {f"{name}_per_device": value / self.num_devices for name, value in found.items()}
        found[f"{SPEED}/data_wait_share"] = min(waited * rate, 1.0) if worked else math.nan
        if f"{SPEED}/tokens_per_second" in found and self.peak is not None:
            found |= self._utilisation(work, rate / self.num_devices)
        if self.on_cuda:
            found[f"{MEMORY}/peak_gib"] = peak
        return found

    def _utilisation(self, work: Mapping[str, float], rate: float) -> dict[str, float]:
        """Return the shares of the peak, for the work of all devices and the rate of a whole second on one."""
        found = {}
        if self.flops is not None:
            operations = self.flops.per_token * work["of_documents"] + self.flops.per_pair * work["squared"]
            found[f"{SPEED}/mfu"] = operations * rate / (self.peak or math.nan)
        if self.flops_per_token > 0:
            found[f"{SPEED}/mfu_6n"] = self.flops_per_token * work["tokens"] * rate / (self.peak or math.nan)
        return found


def holds_documents(tokens: torch.Tensor, batch: Mapping[str, Any]) -> bool:
    """Whether positions alone tell where documents begin in a batch's rows of `tokens`, as in packed ones."""
    positions = batch.get("position_ids")
    return batch.get("attention_mask") is None and getattr(positions, "shape", None) == tokens.shape


def documents_in(tokens: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """
    Return the tokens of a batch's documents and the sum of their squared lengths, [2] int64, without a host sync.

    A row of `tokens` [rows, length] is a document without what its `attention_mask` leaves out; in rows without a mask
    one begins wherever `position_ids` are 0.
    """
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        lengths = mask.ne(0).sum(dim=1)
        return torch.stack([lengths.sum(), lengths.square().sum()])
    if positions is not None and holds_documents(tokens, batch):
        count = num_tokens(batch)
        # The first n odd numbers add up to the square of n; what pads a row is at position 0, and is no document.
        return torch.stack([count, (2 * positions).sum() + count])
    rows, length = tokens.shape
    return to_device(torch.tensor([rows * length, rows * length**2], device="cpu"), tokens.device)


def as_text(rates: Mapping[str, float]) -> str | None:
    """Return the rates for a line, such as `122.3 samples/s, 15.7k tokens/s`; None for an empty window."""
    samples, tokens = rates[f"{SPEED}/samples_per_second"], rates.get(f"{SPEED}/tokens_per_second")
    if math.isnan(samples):
        return None
    if tokens is None:
        return f"{samples:.1f} samples/s"
    unit, scale = next(((unit, scale) for unit, scale in (("M", 1e6), ("k", 1e3)) if tokens >= scale), ("", 1.0))
    return f"{samples:.1f} samples/s, {tokens / scale:.3g}{unit} tokens/s"
