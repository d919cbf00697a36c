"""Find the best evaluation so far, and decide on early stopping."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from harness.training.flags import BestConfig
from harness.training.state import TrainState

logger = logging.getLogger(__name__)


class BestModel:
    """Compares evaluations; the result is kept in the run's state."""

    def __init__(self, config: BestConfig, *, metric: str | None, keeps_checkpoints: bool) -> None:
        self.config, self.metric, self.keeps_checkpoints = config, metric, keeps_checkpoints
        if config.greater_is_better is None:
            self.greater_is_better = not (metric or "").endswith("loss")
        else:
            self.greater_is_better = config.greater_is_better

    @property
    def early_stopping(self) -> dict[str, Any] | None:
        """The arguments of the EarlyStoppingCallback that this replaces, for trainer_state.json."""
        if self.config.early_stopping_patience is None:
            return None
        names = ("early_stopping_patience", "early_stopping_threshold")
        return {name: getattr(self.config, name) for name in names}

    def update(self, metrics: Mapping[str, float], state: TrainState) -> bool:
        """Compare an evaluation's metrics; returns whether it is the best so far. May set `state.should_stop`."""
        if self.metric is None:
            return False
        value = metrics[self.metric]
        # As the Trainer's callback, which compares before the best value is replaced.
        self._count_patience(value, state)
        best = state.best_metric
        if best is None:
            best = -math.inf if self.greater_is_better else math.inf
            state.best_metric = best
        if not self._is_better(value, best):
            return False
        state.best_metric = value
        if self.keeps_checkpoints:
            state.best_global_step = state.global_step
        return True

    def _count_patience(self, value: float, state: TrainState) -> None:
        patience, best = self.config.early_stopping_patience, state.best_metric
        if patience is None:
            return
        enough = best is None or (
            self._is_better(value, best) and abs(value - best) > self.config.early_stopping_threshold
        )
        state.early_stopping_patience_counter = 0 if enough else state.early_stopping_patience_counter + 1
        if state.early_stopping_patience_counter >= patience:
            state.should_stop = True
            logger.info("Early stopping: %s has not improved for %d evaluations.", self.metric, patience)

    def _is_better(self, value: float, than: float) -> bool:
        return value > than if self.greater_is_better else value < than
