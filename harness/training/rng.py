"""Seed, capture and restore the random generators of a process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import enable_full_determinism, set_seed

RngState = dict[str, Any]


def seed_everything(seed: int, *, full_determinism: bool) -> None:
    """Seed Python, numpy and torch with the same seed on all ranks, as the Trainer does."""
    if full_determinism:
        enable_full_determinism(seed)
    else:
        set_seed(seed)


def capture(*, world_size: int = 1) -> RngState:
    """
    Return the state of all generators, in the keys and types of the Trainer's `rng_state.pth`.

    With more than one process "cuda" holds the states of all visible devices, as the Trainer's does.
    """
    state: RngState = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all() if world_size > 1 else torch.cuda.get_rng_state()
    return state


def restore(state: RngState) -> None:
    """Restore what `capture` returned, or what a Trainer saved."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        if isinstance(state["cuda"], list):
            # This machine may show fewer devices than the one that saved.
            for i, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(device_state, i)
        else:
            torch.cuda.set_rng_state(state["cuda"])


def capture_host() -> RngState:
    """Return the state of the generators that a collator or a sampler may use. Takes microseconds, no device sync."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the generators of `capture_host` from numbers of 0 or more for the block; then restore them."""
    before = capture_host()
    python, numpy, cpu = np.random.SeedSequence(numbers).generate_state(3, np.uint64).tolist()
    random.seed(python)
    np.random.seed(numpy % 2**32)
    torch.default_generator.manual_seed(cpu)  # torch.manual_seed would also seed the devices' generators
    try:
        yield
    finally:
        restore(before)
