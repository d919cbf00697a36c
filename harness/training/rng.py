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


def capture(device: torch.device, *, world_size: int = 1) -> RngState:
    """
    Return the state of all generators, in the keys and types of the Trainer's `rng_state.pth`.

    `device` is the one that this rank trains on: a GPU that it does not use is left alone. With more than one process
    "cuda" holds the states of all visible devices, as the Trainer's does.
    """
    state = capture_host()
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state_all() if world_size > 1 else torch.cuda.get_rng_state()
    return state


def capture_own(device: torch.device) -> RngState:
    """Return the state of this rank's device alone, by the device's type; {} for the CPU."""
    if device.type == "cpu":
        return {}
    return {device.type: torch.get_device_module(device).get_rng_state()}  # of the current one, which is the rank's


def restore(state: RngState, device: torch.device) -> None:
    """
    Restore what `capture` returned, or what a Trainer saved, into a rank that trains on `device`.

    Under "own" there may be what `capture_own` returned. It comes before "cuda", where states go by the index that a
    device has on its node: the rank may have another one now.
    """
    restore_host(state)
    own, theirs = state.get("own", {}), state.get("cuda")
    if device.type in own:
        torch.get_device_module(device).set_rng_state(own[device.type])
    elif device.type == "cuda" and isinstance(theirs, list):
        for i in range(torch.cuda.device_count()):
            torch.cuda.set_rng_state(theirs[i % len(theirs)], i)
    elif device.type == "cuda" and theirs is not None:
        torch.cuda.set_rng_state(theirs)


def capture_host() -> RngState:
    """Return the state of the generators that a collator or a sampler may use. Takes microseconds, no device sync."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}


def restore_host(state: RngState) -> None:
    """Restore what `capture_host` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])


@contextmanager
def kept() -> Iterator[None]:
    """Put the generators of the host back at the end of the block, and those of the GPUs if they were in use."""
    before, had_devices = capture_host(), torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    of_devices = torch.cuda.get_rng_state_all() if had_devices else []
    try:
        yield
    finally:
        restore_host(before)
        if of_devices:
            torch.cuda.set_rng_state_all(of_devices)


@contextmanager
def seeded(*numbers: int, device: torch.device | None = None) -> Iterator[None]:
    """
    Seed the generators of `capture_host` from numbers of 0 or more for the block; then restore them.

    That of a `device` too, if one is given.
    """
    before = capture_host()
    python, numpy, cpu = np.random.SeedSequence(numbers).generate_state(3, np.uint64).tolist()
    random.seed(python)
    np.random.seed(numpy % 2**32)
    torch.default_generator.manual_seed(cpu)  # torch.manual_seed would also seed the devices' generators
    own = {} if device is None else capture_own(device)
    for kind in own:
        torch.get_device_module(kind).manual_seed(cpu)
    try:
        yield
    finally:
        restore_host(before)
        for kind, state in own.items():
            torch.get_device_module(kind).set_rng_state(state)
