"""
What the tests of this folder share: each trains on CUDA where there is a card, and on the CPU where there is none.

`pytest -m gpu tests/gpu` runs them, `--device cpu` on a machine with a card too. All are marked `gpu` by being here,
but those of the driver itself.
A test takes the fixture `device` ("cuda" or "cpu") and has small sizes on the CPU, so that no line of it is untried.
What a CPU can't compute calls `needs_card("fp16's scaler")` right before its first device call: on the CPU the test
ends there, and its outcome is `not tried`. A figure for the table goes into `record_property("name", value)`.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils.import_utils import enable_tf32

from harness.distributed.precision import tf32_kept
from tests.gpu.outcomes import NOT_TRIED
from tests.support.forking import forks_reach

NeedsCard = Callable[[str], None]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.parent == Path(__file__).parent and item.path.name != "test_driver.py"]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if device_of(config) == "cuda":  # what only a card makes libraries say is read in the log, and fails nothing
            item.add_marker(pytest.mark.filterwarnings("default"))


def device_of(config: pytest.Config) -> str:
    asked = config.getoption("--device")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """The type of the device to train on."""
    found = device_of(pytestconfig)
    if found == "cuda":
        # Torch asks for it once, when a process first multiplies on the card: --full_determinism may come later.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return found


@pytest.fixture
def needs_card(device: str) -> NeedsCard:
    """Ends a test on the CPU where it comes to what only a card can do, which it names."""

    def end(what: str) -> None:
        if device == "cpu":
            pytest.skip(f"{NOT_TRIED}: {what} needs a card")

    return end


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a training in this process with --full_determinism: takes back the variables that Transformers sets."""
    for name in ("CUDA_LAUNCH_BLOCKING", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")


@pytest.fixture(scope="session")
def processes(device: str) -> None:
    """For a test that starts processes: forked ones, with the libraries loaded, if such a one reaches the device."""
    forks_reach(device)


@pytest.fixture(autouse=True)
def card_left_free(device: str) -> Iterator[None]:
    """Give back the memory of a test on the card, and its choices of precision."""
    with tf32_kept():
        yield
    enable_tf32.cache_clear()  # the Trainer's next choice would not be made if it has made the same before
    torch.compiler.reset()
    if (inductor := sys.modules.get("torch._inductor.async_compile")) is not None:
        threads = inductor.AsyncCompile.pool  # it makes them at its first use, and keeps them
        if threads.cache_info().currsize:
            threads().shutdown()
            threads.cache_clear()
    if device == "cuda":
        gc.collect()
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
