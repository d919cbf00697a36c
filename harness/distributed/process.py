"""The state of torch and accelerate in this process that a run changes and puts back at its end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from harness.distributed.precision import tf32_kept


@contextmanager
def process_kept() -> Iterator[None]:
    """
    Put back what is deterministic, TF32, the filters of warnings, and accelerate's state, at the end of the block.

    Accelerate's state is the caller's if there was one; else the next run makes its own.
    """
    had_state, had_processes = bool(AcceleratorState._shared_state), bool(PartialState._shared_state)
    had_gradients = bool(GradientState._shared_state)
    with warnings.catch_warnings(), tf32_kept(), _determinism_kept():
        try:
            yield
        finally:
            if not had_state:
                AcceleratorState._reset_state(reset_partial_state=not had_processes)
            if not had_gradients:
                GradientState._reset_state()


@contextmanager
def _determinism_kept() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before = cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        cudnn.deterministic, cudnn.benchmark = before
