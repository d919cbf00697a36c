"""Ranks take turns: the first prepares, the others find what it has made, and what one raises ends all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator

from harness.distributed.accelerator import agree
from harness.errors import ConfigError, RankError

Answer = TypeVar("Answer")

# Its own traceback comes first, before the launcher ends all ranks or the others say that it failed.
SECONDS_FOR_TRACEBACK = 3.0


def is_first(accelerator: Accelerator, *, local: bool) -> bool:
    """Whether this is the first rank: of its node, or of all."""
    return bool(accelerator.is_local_main_process if local else accelerator.is_main_process)


def main_process_first(
    accelerator: Accelerator, build: Callable[[], Answer], *, local: bool = True, at_once: bool = False
) -> Answer:
    """
    Collective: run `build` on the first rank of each node, then on the others, which find its caches filled.

    Not `local`: on the first rank of all. Or on all `at_once`, where it is collective itself. What one rank raises ends
    all of them, whatever node they are on: a ConfigError is raised on all, another error on its rank, a RankError on
    the others.
    """
    if at_once:
        return build()  # who fails ends, since the others may wait for it in there: the launcher ends them
    results: list[Answer] = []
    for turn in (True, False):
        failure: Exception | None = None
        if is_first(accelerator, local=local) == turn:
            try:
                results.append(build())
            except Exception as error:  # raised when all know of it
                failure = error
        _raise_together(accelerator, failure)
    return results[0]


def _raise_together(accelerator: Accelerator, failure: Exception | None) -> None:
    crash = None if isinstance(failure, ConfigError) else failure
    crashed = agree(accelerator, crash)
    message = agree(accelerator, failure if crash is None else None)
    if crash is not None:
        raise crash
    if crashed is not None:
        time.sleep(SECONDS_FOR_TRACEBACK)
        raise RankError(f"Another rank has failed: {crashed}")
    if message is not None:
        raise ConfigError(message) from failure
