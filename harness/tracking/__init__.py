"""Where the run is reported: W&B by default, or Accelerate's trackers. wandb is imported late."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from harness.tracking.flags import TrackingConfig

if TYPE_CHECKING:
    from harness.tracking.lifecycle import trackers
    from harness.tracking.recorded import run_config, store_configuration
    from harness.tracking.rows.journal import rewrite
    from harness.tracking.tracker import WandbTracker

__all__ = ["TrackingConfig", "WandbTracker", "rewrite", "run_config", "store_configuration", "trackers"]
# The parser reads this package, and loads no accelerate: these are imported when they are asked for.
_MODULES = {
    "WandbTracker": "tracker",
    "rewrite": "rows.journal",
    "run_config": "recorded",
    "store_configuration": "recorded",
    "trackers": "lifecycle",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no {name}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
