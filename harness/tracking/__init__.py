"""Where the run is reported: W&B by default, or Accelerate's trackers. wandb is imported late."""

from harness.tracking.flags import TrackingConfig
from harness.tracking.lifecycle import trackers
from harness.tracking.recorded import run_config, store_configuration
from harness.tracking.rows.names import rewrite
from harness.tracking.tracker import WandbTracker

__all__ = ["TrackingConfig", "WandbTracker", "rewrite", "run_config", "store_configuration", "trackers"]
