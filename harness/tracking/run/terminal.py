"""What wandb prints: in a program whose log is set up by `harness`, its words are records of that log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

logger = logging.getLogger("harness.wandb")


def speak_through_log(settings: Any) -> None:
    """
    Send wandb's warnings and errors to the log, which has no colours and stands above a bar; the rest is for debugging.

    What is left out is said once by the harness itself: where the run is, and its numbers. In a loop of one's own, and
    in a notebook, wandb goes on printing as ever. `settings` are those of the run.
    """
    import wandb

    if not logging.getLogger("harness").handlers:
        return
    merged = wandb.setup().settings.model_copy()  # loaded now: loading them sets up what is printed, too
    merged.update_from_settings(settings)
    is_silent, merged.silent = merged.silent, True  # wandb's word for not printing it itself
    wandb.termsetup(merged, None if is_silent else _Log(merged))


@contextmanager
def terminal_kept() -> Iterator[None]:
    """Let wandb print by itself again at the end of the block, after runs that spoke through the log."""
    try:
        yield
    finally:
        if (wandb := sys.modules.get("wandb")) is not None:
            with suppress(ValueError, wandb.Error):  # a variable that it refuses, which has been said
                wandb.termsetup(wandb.setup().settings, None)


class _Log:
    """wandb's interface for a log. Its lines begin with `wandb: WARNING`, which a record says itself."""

    def __init__(self, settings: Any) -> None:
        self._shows_warnings, self._shows_errors = settings.show_warnings, settings.show_errors

    def info(self, msg: str) -> None:
        logger.debug("%s", _without_prefix(msg))

    def warning(self, msg: str) -> None:
        if self._shows_warnings:
            logger.warning("%s", _without_prefix(msg))

    def error(self, msg: str) -> None:
        if self._shows_errors:
            logger.error("%s", _without_prefix(msg))


def _without_prefix(text: str) -> str:
    lines = (line.removeprefix("wandb: ") for line in text.splitlines())
    return "\n".join(line.removeprefix("WARNING ").removeprefix("ERROR ") for line in lines)
