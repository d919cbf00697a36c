"""The debugging mode: little data, detailed output, and a stop at the first value that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.debug_utils import DebugUnderflowOverflow

from harness.errors import NonFiniteError
from harness.training.flags import DebugConfig

SHOWN_TOKENS = 60
SLOWEST_SHOWN = 12


@contextmanager
def watch_training(
    config: DebugConfig, model: torch.nn.Module, device: torch.device, show: Callable[[str], None]
) -> Iterator[None]:
    """
    Stop the training at the first NaN; at its end, show peak memory and the slowest operations on `device`.

    Raises NonFiniteError in the forward pass; in the backward pass torch's anomaly detection raises RuntimeError.
    """
    if config.debug == "underflow_overflow":
        DebugUnderflowOverflow(model)
    if not config.is_on:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_cuda = device.type == "cuda"
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    stop_at_non_finite(model)
    # There is one cycle, whose events are kept either way; without `acc_events` torch 2.11 warns that they are not.
    profiled = torch.profiler.profile(activities=activities, acc_events=True)
    with torch.autograd.set_detect_anomaly(True), profiled as profile:
        yield
    sort_by = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    show("slowest parts:")
    show(profile.key_averages().table(sort_by=sort_by, row_limit=SLOWEST_SHOWN, max_name_column_width=40))
    show(f"peak memory: {peak_memory(device)}")


def stop_at_non_finite(model: torch.nn.Module) -> None:
    """Hook each module: the first whose output holds NaN or infinity raises NonFiniteError with its name."""

    def check(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                # An attention mask holds -inf, so only the largest value is checked; NaN counts as larger than all.
                if tensor.is_floating_point() and tensor.numel() and not tensor.max() < math.inf:
                    kind = "NaN" if tensor.isnan().any() else "infinity"
                    shape = tuple(tensor.shape)
                    raise NonFiniteError(
                        f"{kind} first appears in the output of {name or 'the model'} "
                        f"({type(module).__name__}, shape {shape}). Look at its inputs and weights there."
                    )

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(check(name))


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def describe_batch(batch: Mapping[str, Any], processing_class: Any) -> str:
    """Return the first micro-batch as text: a line for each tensor, its first sample decoded if it is text."""
    lines = ["first batch:"]
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor):
            lines.append(f"  {name}: {type(value).__name__}")
            continue
        lines.append(f"  {name}: {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}")
    tokens = batch.get("input_ids")
    if isinstance(tokens, torch.Tensor) and hasattr(processing_class, "decode"):
        shown = tokens[0][:SHOWN_TOKENS]
        lines.append(f"  sample 0, decoded: {processing_class.decode(shown)!r}")
        labels = batch.get("labels")
        if isinstance(labels, torch.Tensor) and labels.shape == tokens.shape:
            counted = labels[0][labels[0] != -100][:SHOWN_TOKENS]
            lines.append(f"  its labels, decoded: {processing_class.decode(counted)!r}")
        elif isinstance(labels, torch.Tensor):
            lines.append(f"  its label: {labels[0].tolist()}")
    return "\n".join(lines)


def peak_memory(device: torch.device) -> str:
    """Return the peak memory as text: of a CUDA device, else of the process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on {torch.cuda.get_device_name(device)}"
    import resource
    import sys

    # Linux counts in KiB, macOS in bytes.
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{math.ceil(used / 2**20)} MiB of host memory"
