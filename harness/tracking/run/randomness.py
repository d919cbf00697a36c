"""The training's random numbers stay its own: wandb draws from `random` too, by the clock."""

from __future__ import annotations

import contextlib
import importlib
import random
from typing import Any


def separate_randomness() -> None:
    """
    Give wandb's threads a generator of their own. Twice changes nothing.

    They draw from `random`, in the process that trains, whenever wandb reports on itself (about once a minute) and
    whenever a request has failed. What a collator draws, and what a resume goes on with, would depend on the clock.
    """
    import wandb.sdk.lib.retry

    modules: list[Any] = [wandb.sdk.lib.retry]
    with contextlib.suppress(ImportError):
        modules.append(importlib.import_module("opentelemetry.exporter.otlp.common.http"))
    for module in modules:
        if getattr(module, "random", None) is random:
            module.random = random.Random()
