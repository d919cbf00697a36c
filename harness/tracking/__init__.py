"""Where the run is reported: W&B by default, or Accelerate's trackers. wandb is imported late."""

from harness.tracking.run import (
    TrackingConfig,
    WandbTracker,
    rewrite,
    run_config,
    store_configuration,
    trackers,
)

__all__ = ["TrackingConfig", "WandbTracker", "rewrite", "run_config", "store_configuration", "trackers"]
