"""What differs for a run that a W&B sweep agent has started: W&B says which it is, and keeps the sweep's values."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from harness.agent import NAMES, RECORD, sweep_run
from harness.config import plain

logger = logging.getLogger(__name__)

MOST_NAMED = 10


def of_sweep(init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what `wandb.init` takes: under an agent no project, entity and id, which it passes over with a warning."""
    passed_over = () if sweep_run() is None else ("project", "entity", "id")
    return {name: value for name, value in init_kwargs.items() if name not in passed_over}


def record() -> dict[str, Any]:
    """Return what an agent needs to know of this run when it resumes it: which values are the sweep's own."""
    sweep = sweep_run()
    return {} if sweep is None else {NAMES: sorted(sweep.parameters)}


def unlocked(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the part of a configuration that W&B takes: what the agent gave is locked, all of it where a run is resumed.

    wandb would warn of each value. Those that differ are named here; of the sweep's own parameters it is said before.
    """
    sweep = sweep_run()
    if sweep is None:
        return dict(values)
    given, told = sweep.given, {RECORD, *sweep.parameters}
    differ = sorted(name for name in values.keys() & given.keys() - told if plain(values[name]) != given[name])
    if differ:
        named = ", ".join(differ[:MOST_NAMED]) + (" and others" if len(differ) > MOST_NAMED else "")
        logger.warning(
            "W&B goes on showing what the sweep's run had, though this training has another value: %s.", named
        )
    return {name: value for name, value in values.items() if name not in given}
