"""What an observation of all weights and gradients adds to a step: `wandb.watch` and harness, 124 M parameters."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence

from tests.benchmarks import watch as observing
from tests.benchmarks.gpu import models
from tests.benchmarks.gpu.outcomes import Bound, Device, Figures, rounded


def watch(device: Device, figures: Figures) -> Sequence[Bound]:
    """Both give their histograms to an offline run of W&B within the time measured."""
    pause, shape = (0.3, models.GPT2) if device.on_cuda else (0.05, models.SMALL_GPT2)
    rounds = max(3, round(device.seconds / (4 * pause * len(observing.TURN))))
    with tempfile.TemporaryDirectory() as folder:
        times = observing.observed(rounds, folder, shape=shape, device=device.type, pause=pause)
    medians = {kind: statistics.median(taken) for kind, taken in times.items()}
    added = {kind: medians[kind] - medians["plain"] for kind in ("ours", "wandb.watch")}
    figures["rounds"], figures["plain step ms"] = rounds, rounded(medians["plain"])
    figures |= {f"{kind} adds ms": rounded(more) for kind, more in added.items()}
    figures["our observe() alone ms"] = rounded(medians[observing.ALONE])
    figures["ours / wandb.watch"] = rounded(added["ours"] / added["wandb.watch"])
    return [Bound("ours / wandb.watch", "<=", 1.0)]
