"""Where the run is reported: W&B by default, or Accelerate's trackers. wandb is imported late."""

from harness.tracking.configuration import run_config, store_configuration
from harness.tracking.lifecycle import trackers
from harness.tracking.names import rewrite
from harness.tracking.run import WandbTracker
from harness.tracking.settings import TrackingConfig

__all__ = ["TrackingConfig", "WandbTracker", "rewrite", "run_config", "store_configuration", "trackers"]
