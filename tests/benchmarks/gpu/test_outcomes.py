from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks.gpu.models import GPT2, Work, gpt2
from tests.benchmarks.gpu.outcomes import Benchmark, Bound, Device, Figures, measure_all
from tests.benchmarks.gpu.training import fitting

CPU = Device("cpu", 1.0)


def fast(device: Device, figures: Figures) -> list[Bound]:
    figures["ours / bare"] = 0.99
    return [Bound("ours / bare", ">=", 0.98)]


def raising(device: Device, figures: Figures) -> list[Bound]:
    figures["bare ms"] = 1.5
    raise RuntimeError("no kernel for this")


def ended(device: Device, figures: Figures) -> list[Bound]:
    raise KeyboardInterrupt


def measured(path: Path, **benchmarks: Benchmark) -> tuple[int, list[dict[str, object]]]:
    code = measure_all(benchmarks, CPU, path)
    return code, json.loads(path.read_text(encoding="utf-8"))


def test_a_benchmark_that_raises_is_told_with_what_it_had_found_and_the_next_one_runs(tmp_path: Path) -> None:
    code, (first, second) = measured(tmp_path / "found.json", raising=raising, fast=fast)
    assert code == 1
    assert (first["outcome"], first["figures"]) == ("failed", {"device": "CPU", "bare ms": 1.5})
    assert str(first["why"]).startswith("RuntimeError: no kernel for this (test_outcomes.py:")
    assert (second["name"], second["outcome"]) == ("fast", "not judged")
    assert set(first) == {"name", "outcome", "seconds", "figures", "why"}


def test_a_signal_ends_all_and_leaves_what_was_found(tmp_path: Path) -> None:
    code, rows = measured(tmp_path / "found.json", fast=fast, ended=ended, never=raising)
    assert code == 130
    assert [(row["name"], row["outcome"]) for row in rows] == [("fast", "not judged"), ("ended", "failed")]


@pytest.mark.parametrize(
    ("bound", "holds"),
    [
        (Bound("x", ">=", 1.0), False),
        (Bound("x", ">=", 1.0, slack=0.004), True),
        (Bound("x", "<=", 0.99), False),
        (Bound("x", "<=", 0.99, slack=0.01), True),
    ],
)
def test_a_bound_gives_way_by_what_equal_loops_are_apart(bound: Bound, holds: bool) -> None:
    assert bound.holds({"x": 0.997}) is holds


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    tried = []

    def run(work: Work, device: Device, figures: Figures) -> dict[str, float]:
        tried.append(work.batch)
        if work.batch > 4:
            raise torch.OutOfMemoryError
        return {"ours": 1.0}

    figures: Figures = {}
    assert fitting(Work(gpt2(GPT2), batch=16, length=8, device="cpu"), CPU, figures, run) == {"ours": 1.0}
    assert tried == [16, 8, 4]
    assert figures["out of memory with batch"] == 8


def test_the_hand_count_of_gpt2_is_the_papers() -> None:
    """124 M parameters; 0.86 GFLOP a token at 1,024 tokens."""
    with torch.device("meta"):
        work = Work(gpt2({**GPT2, "vocab_size": 50257}), batch=1, length=1024, device="meta")
        model = work.model()
    assert model.num_parameters() == 124_439_808
    without_positions = 124_439_808 - 1024 * 768
    assert work.flops_per_token(model) == 6 * without_positions + 12 * 12 * 768 * 1024
