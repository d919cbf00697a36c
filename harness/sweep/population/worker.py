"""A worker of a population: takes up segments of the generation that has begun, trains them, and reports the values."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.checkpoint.adopt import adopt, pin
from harness.checkpoint.lock import Lock
from harness.checkpoint.manifest import manifest_of
from harness.config import plain
from harness.errors import HarnessError
from harness.flags import FLAGS
from harness.masking import masked
from harness.signals import Noted, say
from harness.sweep import launch
from harness.sweep.evaluations import Evaluations
from harness.sweep.launch import SECONDS_BETWEEN_LOOKS, End, Place, Training, end_orphan
from harness.sweep.parameters import as_text
from harness.sweep.population.record import described
from harness.sweep.population.schedule import Segment, ancestry
from harness.sweep.population.state import Population
from harness.sweep.study import FLAGS as FLAGS_OF_TRIAL
from harness.sweep.study import STEP, Claim
from harness.sweep.worker import SECONDS_BETWEEN_CLAIMS, SECONDS_WHILE_IN_USE
from harness.tracking import lineage


class Members:
    """
    Works on a population until all members have ended, or until a stop is noted: then the training saves.

    - is_alone: whether what has started this worker, if anything, has died.
    """

    def __init__(self, population: Population, noted: Noted, *, is_alone: Callable[[], bool] = lambda: False) -> None:
        self.population, self.study = population, population.study
        self.noted, self._is_alone = noted, is_alone

    @property
    def is_stopping(self) -> bool:
        """Whether no further segment is to be taken up."""
        return self.noted.signum != 0 or self._is_alone()

    def run(self) -> bool:
        """Work until the population has ended; False if the worker was stopped before. Raises HarnessError."""
        while not self.is_stopping:
            objectives = self.population.objectives()
            self.population.write(objectives)
            left = self.population.segments_left(objectives)
            self._drop(min((segment.from_step for segment in left.values()), default=self.population.rules.num_steps))
            if not left:
                return True
            claim = self.study.claim([*left])
            if claim is None:
                self._pause(SECONDS_BETWEEN_CLAIMS)  # others have the rest, and may die
                continue
            try:
                if not self._work_on(claim, left[claim.number]):
                    return False
            finally:
                claim.lease.release()
        return False

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.is_stopping:
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _drop(self, step: int) -> None:
        """Delete the checkpoints that were kept for the generations before the one that begins at a step."""
        for place in self.population.exchange.glob("*"):
            if place.name.isdigit() and int(place.name) < step:
                shutil.rmtree(place, ignore_errors=True)

    def _work_on(self, claim: Claim, segment: Segment) -> bool:
        """Train a segment to its end, over deaths of its training; False if it was stopped before."""
        place = self.population.place(segment)
        end_orphan(place)
        self._prepare(segment, place)
        self.study.note(claim.number, FLAGS_OF_TRIAL, {name: as_text(each) for name, each in segment.values.items()})
        self._tell(segment, "goes on" if place.attempts() else "begins")
        end: End | None = None
        while end is None or end.how == launch.KILLED:
            if end is not None and place.deaths() >= launch.MOST_DEATHS:
                break
            end = self._attempt(segment, place, claim.lease)
            if end is None:  # another worker has it
                return True
            if self.is_stopping and end.how not in (launch.COMPLETE, launch.STOPPED, launch.FAILED):
                return False
        if end.how == launch.IN_USE:
            self._tell(segment, f"waits ({end.reason})")
            self._pause(SECONDS_WHILE_IN_USE)
            return True
        if not self._has_ended(segment, place):
            raise HarnessError(self._why_not(segment, place, end))
        self._conclude(claim.number, segment, place)
        return True

    def _prepare(self, segment: Segment, place: Place) -> None:
        """Put the checkpoint in place that the segment goes on from, and note its lineage for W&B."""
        source: dict[str, Any] | None = None
        parent = segment.parent
        if parent is not None and segment.is_replaced:
            theirs, own = (self.population.kept(segment.from_step, member) for member in (parent, segment.member))
            source = manifest_of(theirs).get("tracking", {}).get("run")
            note = {"study": self.population.sweep.name, **described(segment, {})}
            if not self._is_adopted(segment, place.run, note):
                arguments = {name: plain(FLAGS[name].value_of(as_text(each))) for name, each in segment.values.items()}
                adopt(theirs, own, place.run, arguments=arguments, note=note)
        place.run.mkdir(parents=True, exist_ok=True)
        lineage.write(place.run, self._facts(segment), source=source, step=segment.from_step)

    def _is_adopted(self, segment: Segment, run: Path, note: dict[str, Any]) -> bool:
        steps = [
            manifest_of(path).get("step", 0) for path in run.glob("checkpoint-*") if launch.WHOLE.fullmatch(path.name)
        ]
        if max(steps, default=0) > segment.from_step:
            return True
        return manifest_of(run / f"checkpoint-{segment.from_step}").get("adopted") == note

    def _facts(self, segment: Segment) -> dict[str, Any]:
        objectives = self.population.objectives()
        decided = self.population.generations(objectives)[: segment.generation + 1]
        trained = [{"member": each.member, **described(each, objectives)} for each in ancestry(decided, segment.member)]
        return {
            "population": {
                "study": self.population.sweep.name,
                "member": segment.member,
                "generation": segment.generation,
                "lineage": trained,
            }
        }

    def _attempt(self, segment: Segment, place: Place, lease: Lock) -> End | None:
        """Start the training and follow it to its end; None if another worker has taken the segment over."""
        training = Training(self.population.words(segment), place)
        return training.followed(lease, self.noted, is_stopping=lambda: self.is_stopping)

    def _has_ended(self, segment: Segment, place: Place) -> bool:
        if segment.to_step == self.population.rules.num_steps:
            return (place.run / launch.COMPLETE_FILE).exists()
        return manifest_of(place.run / f"checkpoint-{segment.to_step}").get("step") == segment.to_step

    def _why_not(self, segment: Segment, place: Place, end: End) -> str:
        what = f"Member {segment.member} has not come to step {segment.to_step}: {masked(end.reason)}"
        return f"{what}. All that it printed: {place.output}. Start the sweep again to go on from its last checkpoint."

    def _conclude(self, number: int, segment: Segment, place: Place) -> None:
        """Keep the checkpoint for members that may go on from it, then tell the study the value."""
        if segment.to_step < self.population.rules.num_steps:
            kept = self.population.kept(segment.to_step, segment.member)
            kept.parent.mkdir(parents=True, exist_ok=True)
            pin(place.run / f"checkpoint-{segment.to_step}", kept)
        rows = Evaluations(place.run, self.population.metric)
        value = rows.now().get(segment.to_step)
        if value is None:
            there = ", ".join(sorted(name for name in rows.names if name.startswith("eval/"))) or "no evaluation"
            raise HarnessError(
                f"metric.name: {self.population.metric} is in no row of step {segment.to_step}; there is: {there}."
            )
        self.study.note(number, STEP, segment.to_step)
        worst = math.inf if self.population.rules.is_minimized else -math.inf
        self.study.complete(number, worst if math.isnan(value) else value)
        self._tell(segment, f"{self.population.metric} {value:.6g}")

    def _tell(self, segment: Segment, what: str) -> None:
        values = " ".join(f"{name}={as_text(value)}" for name, value in segment.values.items())
        source = f" from member {segment.parent}" if segment.is_replaced else ""
        say(f"member {segment.member} steps {segment.from_step}-{segment.to_step}{source} {what}: {values}", sys.stdout)
