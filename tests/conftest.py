"""What every test needs: no network, caches of its own, one thread, nothing left behind."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import threading
from collections.abc import Iterator

import pytest

# Before the libraries are imported: they read these once.
_CACHE = tempfile.TemporaryDirectory(prefix="harness-tests-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=_CACHE.name,
    HF_DATASETS_CACHE=f"{_CACHE.name}/datasets",
    # Sums differ in the last bits with another number of threads.
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WANDB_DATA_DIR=f"{_CACHE.name}/wandb-data",
    WANDB_CACHE_DIR=f"{_CACHE.name}/wandb-cache",
    WANDB_CONFIG_DIR=f"{_CACHE.name}/wandb-config",
)

import torch
from accelerate.state import AcceleratorState, GradientState

torch.set_num_threads(1)

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# pytest names the running test; torch, wandb and deepspeed leave these when they are used.
SET_BY_LIBRARIES = ("PYTEST_", "KMP_", "WANDB_", "TRITON_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "PYTORCH_NVML_")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["cpu", "cuda"], help="where tests/gpu trains; else on CUDA if there is a card"
    )


def left_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in set(threading.enumerate()) - before if not thread.daemon]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaks environment variables, threads or a process group; reset accelerate's singletons."""
    environment, threads = dict(os.environ), set(threading.enumerate())
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.use_deterministic_algorithms(deterministic)
    assert not torch.distributed.is_initialized()
    changed = {name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name)}
    changed = {name for name in changed if not name.startswith(SET_BY_LIBRARIES)}
    os.environ.clear()
    os.environ.update(environment)
    assert not changed, f"the test left changed environment variables: {changed}"
    if left_threads(threads):
        gc.collect()  # a stream that was not read to its end keeps its reader until then
        for thread in left_threads(threads):
            thread.join(2)  # an executor that is collected tells its threads to end, they need a moment
    left = left_threads(threads)
    assert not left, f"the test left threads: {left}"
