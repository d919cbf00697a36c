"""A worker: takes up trials of a study one after the other, trains each, and tells the study what came of it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.checkpoint.lock import Lock
from harness.masking import masked
from harness.signals import Noted, say
from harness.sweep import launch
from harness.sweep.checks import as_flags
from harness.sweep.evaluations import Evaluations
from harness.sweep.launch import SECONDS_BETWEEN_LOOKS, End, Place, Training, end_orphan
from harness.sweep.parameters import Scalar, as_text
from harness.sweep.study import STEP, Claim, Study, Sweep
from harness.training.flags import Word

PRUNING_FILE = "pruning.json"
SECONDS_BETWEEN_CLAIMS = 1.0
SECONDS_WHILE_IN_USE = 10.0

DONE, STOPPED, LOST, IN_USE = "done", "stopped", "lost", "in use"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial that is being worked on, and how it is started."""

    number: int
    place: Place
    words: tuple[str, ...]
    lease: Lock


def place_of(sweep: Sweep, study: Study, number: int) -> Place:
    """Return the folders of a trial."""
    return Place(run=sweep.folder / str(number), work=study.leases.place(number))


def own_flags(sweep: Sweep, place: Place, number: int) -> list[str]:
    """Return the flags that make a training the run of a trial, and let it go on where an attempt before has ended."""
    of_sweep = {"wandb_project": sweep.spec.project, "wandb_entity": sweep.spec.entity}
    given = [f"--{name}={value}" for name, value in of_sweep.items() if value and not _has(sweep.flags, name)]
    return [
        *given,
        f"--output_dir={place.run}",
        "--resume_from_checkpoint=auto",
        f"--run_name={sweep.name}-{number}",
        f"--wandb_run_group={sweep.name}",
    ]


def _has(flags: Any, name: str) -> bool:
    return any(word.partition("=")[0].replace("-", "_") == f"__{name}" for word in flags)


class Worker:
    """
    Works on a study until it is over, or until a stop is noted: then the training saves and the trial waits.

    - is_alone: whether what has started this worker, if anything, has died.
    """

    def __init__(self, sweep: Sweep, noted: Noted, *, is_alone: Callable[[], bool] = lambda: False) -> None:
        self.sweep, self.noted, self._is_alone = sweep, noted, is_alone
        self.study = Study(sweep)
        self._in_use_until: dict[int, float] = {}

    @property
    def is_stopping(self) -> bool:
        """Whether no further trial is to be taken up."""
        return self.noted.signum != 0 or self._is_alone()

    def run(self) -> bool:
        """Work until the study is over; False if it was stopped before. Raises HarnessError."""
        while not self.is_stopping:
            claim = self.study.claim()
            if claim is None:
                if self.study.is_over():
                    return True
                self._pause(SECONDS_BETWEEN_CLAIMS)  # others have the rest, and may die
                continue
            try:
                how = self._work_on(claim)
            finally:
                claim.lease.release()
            if how == STOPPED:
                return False
            if how == IN_USE:
                self._pause(SECONDS_WHILE_IN_USE)
        return False

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.is_stopping:
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _work_on(self, claim: Claim) -> str:
        """Train a trial to its end, over deaths of its training; returns DONE, STOPPED, LOST or IN_USE."""
        number, place = claim.number, place_of(self.sweep, self.study, claim.number)
        end_orphan(place)
        values = self.study.values_of(number)
        words = self.sweep.command.words([*self.sweep.flags, *as_flags(values), *self._flags(place, number)])
        trial = Trial(number=number, place=place, words=tuple(words), lease=claim.lease)
        if (end := self._known_end(place)) is None:
            self._tell(number, f"{'goes on' if place.attempts() else 'begins'}: {described(values)}")
        while end is None or end.how == launch.KILLED:
            if end is not None and place.deaths() >= launch.MOST_DEATHS:
                break
            end = self._attempt(trial)
            if end is None:
                return LOST
            if self.is_stopping and end.how not in (launch.COMPLETE, launch.STOPPED, launch.FAILED):
                return STOPPED
        if end.how == launch.PREEMPTED:
            self._tell(number, f"was told to stop, and waits: {end.reason}")
            return STOPPED
        if end.how == launch.IN_USE:
            self._tell(number, f"waits: {end.reason}")
            return IN_USE
        self._conclude(trial, end, values)
        return DONE

    def _flags(self, place: Place, number: int) -> list[str]:
        flags = own_flags(self.sweep, place, number)
        if self.sweep.spec.early_terminate is not None:
            flags.append(f"--pruning_file={place.work / PRUNING_FILE}")
        return flags

    def _known_end(self, place: Place) -> End | None:
        """Return how the trial's training has ended, where only the study has not heard of it."""
        last = (place.attempts() or [{}])[-1]
        if last.get("how") in (launch.COMPLETE, launch.STOPPED, launch.FAILED):
            return launch.what_ended(int(last.get("code", 1)), place)
        return None

    def _attempt(self, trial: Trial) -> End | None:
        """Start the training and follow it to its end; None if another worker has taken the trial over."""
        training = Training(trial.words, trial.place)
        evaluations = Evaluations(trial.place.run, self.sweep.spec.metric.name)
        return training.followed(
            trial.lease,
            self.noted,
            is_stopping=lambda: self.is_stopping,
            look=lambda: self._follow(trial, evaluations.now()),
        )

    def _follow(self, trial: Trial, values: Mapping[int, float]) -> None:
        """Report what evaluations there are, and let the training know whether it goes on."""
        prunes = self.sweep.spec.early_terminate is not None
        path = trial.place.work / PRUNING_FILE
        word = Word.read(path)
        for evaluation, (step, value) in enumerate(values.items(), start=1):
            if step <= word.through:
                continue
            self.study.report(trial.number, evaluation, value)
            ends = prunes and self.study.should_prune(trial.number)
            word = Word(through=step, prune_at=step if ends and word.prune_at is None else word.prune_at)
            word.write(path)

    def _conclude(self, trial: Trial, end: End, values: Mapping[str, Scalar]) -> None:
        """Tell the study what came of a trial."""
        number, metric = trial.number, self.sweep.spec.metric.name
        found = Evaluations(trial.place.run, metric)
        steps = dict(found.now())
        self.study.note(number, STEP, found.last_step)
        last = list(steps.values())[-1:]
        shown = f"{metric} {last[0]:.6g}" if last else f"no {metric}"
        if end.how == launch.COMPLETE and last and last[0] == last[0]:
            self.study.complete(number, last[0])
            self._tell(number, f"{shown}; {self._standing(number)}: {described(values)}")
        elif end.how == launch.COMPLETE:
            there = ", ".join(sorted(name for name in found.names if name.startswith("eval/"))) or "no evaluation"
            reason = f"{metric} is nan" if last else f"{metric} is in no row; there is: {there}"
            self._fail(number, reason)
        elif end.how == launch.STOPPED:
            at = Word.read(trial.place.work / PRUNING_FILE).prune_at
            reason = end.reason if at is None else f"at step {at}, {shown}"
            self.study.prune(number, reason)
            self._tell(number, f"pruned {reason}: {described(values)}")
        elif end.how == launch.KILLED:
            since = trial.place.last_checkpoint() or "its start"
            self._fail(number, f"{end.reason}, {launch.MOST_DEATHS} times since {since}: is memory short?")
        else:
            self._fail(number, end.reason)

    def _standing(self, number: int) -> str:
        best = self.study.best()
        if best is None or best.number == number:
            return "the best so far"
        return f"the best is still {best.value:.6g}, trial {best.number}"

    def _fail(self, number: int, reason: str) -> None:
        self.study.fail(number, reason)
        place = self.study.leases.place(number)
        self._tell(number, f"failed: {masked(reason)} (all that it printed: {place / launch.OUTPUT_FILE})")

    def _tell(self, number: int, text: str) -> None:
        say(f"trial {number} {text}", sys.stdout)


def described(values: Mapping[str, Scalar]) -> str:
    """Return parameters for a line of text."""
    return " ".join(f"{name}={as_text(value)}" for name, value in values.items())


def parent_watch() -> Callable[[], bool]:
    """Return what says whether the process that started this one has died since."""
    parent = os.getppid()
    return lambda: os.getppid() != parent
