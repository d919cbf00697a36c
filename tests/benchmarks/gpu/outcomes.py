"""What a benchmark has found, how it is judged, and the file that is whole after each of them."""

from __future__ import annotations

import gc
import json
import math
import operator
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.training.throughput import peak_flops

Figures = dict[str, float | str]
HOLDS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Device:
    """Where a benchmark runs, and about how long it measures there, without starts and compilation."""

    type: str
    seconds: float

    @property
    def on_cuda(self) -> bool:
        return self.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.on_cuda else "CPU"

    @property
    def peak(self) -> float | None:
        return peak_flops(self.name, "bf16")

    def wait(self) -> float:
        """The time when all that was given to the device is done."""
        if self.on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self, kind: str) -> float:
        """Bytes that tensors take now (`memory_allocated`), or at most took (`max_memory_allocated`)."""
        return float(getattr(torch.cuda, kind)()) if self.on_cuda else 0.0

    def free(self) -> None:
        """Give back what nobody holds any more, and measure the most memory from here on."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Bound:
    """What a figure is held against; `slack` is what two equal loops are apart on this machine."""

    figure: str
    relation: str
    limit: float
    slack: float = 0.0

    def holds(self, figures: Mapping[str, float | str]) -> bool:
        slack = -self.slack if self.relation == ">=" else self.slack
        return bool(HOLDS[self.relation](float(figures[self.figure]), self.limit + slack))

    def __str__(self) -> str:
        slack = f", give or take {self.slack:.3f}" if self.slack else ""
        return f"{self.figure} {self.relation} {self.limit:g}{slack}"


# Fills in the figures as it finds them, so that one that is ended leaves what it has; returns what to judge.
Benchmark = Callable[[Device, Figures], Sequence[Bound]]


def rounded(value: float) -> float:
    """Four digits, as the tables show them."""
    return float(f"{value:.4g}") if math.isfinite(value) and value < 1000 else float(round(value))


def measure(name: str, benchmark: Benchmark, device: Device) -> dict[str, Any]:
    """Run a benchmark; what it raises is part of its result. KeyboardInterrupt too: the caller ends then."""
    began = time.perf_counter()
    figures: Figures = {"device": device.name}
    bounds: Sequence[Bound] = ()
    outcome, why, interrupted = "failed", "", False
    try:
        bounds = benchmark(device, figures)
    except KeyboardInterrupt:
        why, interrupted = "ended by a signal", True
    except Exception as error:  # told in the result, and the next one goes on
        frame = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        traceback.print_exception(error)
    else:
        missed = [bound for bound in bounds if not bound.holds(figures)]
        why = "; ".join(f"{bound.figure} is {figures[bound.figure]}, bound {bound}" for bound in missed)
        outcome = "failed" if missed else "passed"
        if bounds and not device.on_cuda:
            outcome, why = "not judged", "not judged on the CPU"
    for bound in bounds:
        figures[f"bound {bound}"] = "holds" if bound.holds(figures) else "missed"
    seconds = round(time.perf_counter() - began, 1)
    row = {"name": name, "outcome": outcome, "seconds": seconds, "figures": figures, "why": why}
    return {**row, "interrupted": True} if interrupted else row


def shown(row: Mapping[str, Any]) -> str:
    """A row as a short table."""
    lines = [f"== {row['name']}: {row['outcome']} after {row['seconds']} s. {row['why']}".rstrip()]
    for name, value in row["figures"].items():
        lines.append(f"   {name:44} {value if isinstance(value, str) else f'{value:g}':>12}")
    return "\n".join(lines)


def write_whole(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    fresh = path.with_name(f"{path.name}.partial")
    fresh.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def measure_all(benchmarks: Mapping[str, Benchmark], device: Device, path: Path | None) -> int:
    """Run one after the other; the file holds all that have ended. Returns 1 if any failed, 130 if it was ended."""
    rows: list[dict[str, Any]] = []
    for name, benchmark in benchmarks.items():
        row = measure(name, benchmark, device)
        interrupted = row.pop("interrupted", False)
        rows.append(row)
        if path is not None:
            write_whole(path, rows)
        print(shown(row), flush=True)
        if interrupted:
            return 130
        device.free()
    return int(any(row["outcome"] == "failed" for row in rows))
