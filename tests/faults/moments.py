"""Wait for the drawn moment at which to kill an attempt, by watching what it writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.attempt import Attempt, committed_steps
from tests.faults.plan import EVALUATION_SECONDS, STEP_SECONDS, STEPS, Kill

SAVE_SECONDS = 0.08
COMMIT_SECONDS = 0.02
UPLOAD_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Seconds that the phases of an attempt take, measured at one that was left alone."""

    startup: float
    opening: float
    closing: float


def measured(attempt: Attempt) -> Durations:
    """Return the durations of an attempt that has ended."""
    built, steps = attempt.lines("built")[0], attempt.lines("steps")
    return Durations(startup=built - attempt.began_at, opening=steps[0] - built, closing=attempt.ended_at - steps[-1])


def wait_for(kill: Kill, attempt: Attempt, durations: Durations, requests: Path | None) -> bool:
    """Whether the moment came before the attempt ended. `requests` is the log of the W&B server. Raises HungError."""
    if kill.moment == "startup":
        return attempt.sleep(attempt.began_at + kill.part * durations.startup - time.time())
    if kill.moment == "opening":
        return attempt.wait_for(lambda: attempt.is_built) and attempt.sleep(kill.part * durations.opening)
    step = STEPS if kill.moment == "closing" else kill.step
    if not attempt.wait_for(lambda: attempt.is_built and len(attempt.lines("steps")) > 0 and attempt.step >= step):
        return False
    condition, seconds = _event(kill.moment, attempt, requests, durations)
    return attempt.wait_for(condition) and attempt.sleep(kill.part * seconds)


def _event(
    moment: str, attempt: Attempt, requests: Path | None, durations: Durations
) -> tuple[Callable[[], bool], float]:
    """What has to happen from now on, and how long it lasts."""
    if moment == "step":
        return (lambda: True), 2 * STEP_SECONDS
    if moment == "closing":
        return (lambda: True), durations.closing
    if moment == "evaluation":
        evaluations = len(attempt.lines("evaluations"))
        return (lambda: len(attempt.lines("evaluations")) > evaluations), EVALUATION_SECONDS
    if moment == "upload":
        uploads = _uploads(requests)
        return (lambda: _uploads(requests) > uploads), UPLOAD_SECONDS
    committed = set(committed_steps(attempt.output_dir))
    if moment == "commit":
        return (lambda: not committed.issuperset(committed_steps(attempt.output_dir))), COMMIT_SECONDS

    def is_saving() -> bool:  # a Trainer writes into the folder itself
        is_partial = any(attempt.output_dir.glob("checkpoint-*.partial"))
        return is_partial or not committed.issuperset(committed_steps(attempt.output_dir))

    return is_saving, SAVE_SECONDS


def _uploads(requests: Path | None) -> int:
    return 0 if requests is None else requests.read_bytes().count(b'"put artifact/')
