"""A study of Optuna that several workers share: made once, all its trials waiting; each taken up by one at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from harness.checkpoint.lock import Lock
from harness.config import plain
from harness.errors import ConfigError
from harness.files import write_whole
from harness.masking import masked
from harness.sweep.command import Command
from harness.sweep.lease import Leases
from harness.sweep.parameters import Scalar, as_text
from harness.sweep.spec import Spec
from harness.sweep.storage import check_optuna, open_storage, patiently

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

STUDY_FILE = "study.json"
FOLDER = "{folder}"  # stands there for the folder itself, which may be moved
WORK = "trials"  # folder of the leases, and of what else belongs to the work on a trial
TOKEN, SWEEP, MADE = "harness:token", "harness:sweep", "harness:made"  # attributes of the study
FLAGS, REASON, STEP = "flags", "reason", "step"  # attributes of a trial
MOST_FAILURES = 3  # when so many trials have failed, and none has come to anything, all will


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """
    All that a command line says of a sweep.

    - flags: those of all trials, as they are typed; arguments: what of them decides of a trial's numbers.
    - folder, storage: where the runs are, and where Optuna keeps the study.
    - count: how many trials; seed: the sampler's.
    - command: how a training is started.
    """

    spec: Spec
    name: str
    folder: Path
    storage: str
    count: int
    seed: int = 0
    flags: Sequence[str] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    command: Command = field(default_factory=Command)

    def facts(self) -> dict[str, Any]:
        """What decides of the trials, for a later start to compare."""
        given = {"seed": self.seed, **self.spec.raw, "flags": self.arguments}
        found: dict[str, Any] = json.loads(json.dumps(masked(plain(given))))
        return found


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that this worker has the lease on."""

    number: int
    lease: Lock


class Study:
    """The study of a sweep, opened. What it does to the storage is tried again while others have it locked."""

    def __init__(self, sweep: Sweep) -> None:
        import optuna

        self.sweep = sweep
        self.leases = Leases(sweep.folder / WORK)
        self.storage = open_storage(sweep.storage)
        self._study = patiently(
            lambda: optuna.load_study(study_name=sweep.name, storage=self.storage, pruner=pruner_of(sweep.spec))
        )
        self._id = patiently(lambda: self.storage.get_study_id_from_name(sweep.name))
        self.trials()  # Optuna's cache knows only trials that were listed

    def trials(self) -> list[FrozenTrial]:
        """Return all trials by their number."""
        return patiently(lambda: self.storage.get_all_trials(self._id, deepcopy=False))

    def trial(self, number: int) -> FrozenTrial:
        """Return a trial as it is now."""
        return patiently(lambda: self.storage.get_trial(self._id_of(number)))

    def claim(self, among: Collection[int] | None = None) -> Claim | None:
        """
        Take up a trial that nobody works on: one whose worker has ended, else the next; None if there is none.

        `among` are the numbers of those that may be taken up now; None: all.
        """
        from optuna.trial import TrialState

        trials = self.trials()
        may_begin = not self.is_enough(trials)
        unfinished = [trial for trial in trials if not trial.state.is_finished()]
        unfinished = [trial for trial in unfinished if among is None or trial.number in among]
        for trial in sorted(unfinished, key=lambda trial: (trial.state == TrialState.WAITING, trial.number)):
            waits = trial.state == TrialState.WAITING
            if (waits and not may_begin) or (lease := self.leases.take(trial.number)) is None:
                continue
            now = self.trial(trial.number).state
            if now.is_finished():  # by another worker, meanwhile
                lease.release()
                continue
            if now == TrialState.WAITING:
                self._put_state(trial.number, TrialState.RUNNING, None)
            return Claim(number=trial.number, lease=lease)
        return None

    def is_over(self) -> bool:
        """Whether there is no trial left to begin or to go on with."""
        from optuna.trial import TrialState

        trials = self.trials()
        states = {trial.state for trial in trials}
        return TrialState.RUNNING not in states and (TrialState.WAITING not in states or self.is_enough(trials))

    def is_enough(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether no further trial is to begin: one has reached the target, or all of them fail."""
        from optuna.trial import TrialState

        finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        if any(self.sweep.spec.metric.is_reached(float(trial.value or 0.0)) for trial in finished):
            return True
        states = [trial.state for trial in trials if trial.state.is_finished()]
        return states.count(TrialState.FAIL) >= MOST_FAILURES and {*states} == {TrialState.FAIL}

    def values_of(self, number: int) -> dict[str, Scalar]:
        """Return the parameters of a trial, which it keeps; those that it lacks are drawn by the trial's own seed."""
        trial = self._trial(number)
        values = patiently(lambda: {name: each.suggest(trial) for name, each in self.sweep.spec.parameters.items()})
        self.note(number, FLAGS, {name: as_text(value) for name, value in values.items()})
        return values

    def report(self, number: int, evaluation: int, value: float) -> None:
        """Record the value of a trial's n-th evaluation, once."""
        if evaluation not in self.trial(number).intermediate_values:
            patiently(lambda: self.storage.set_trial_intermediate_value(self._id_of(number), evaluation, value))

    def should_prune(self, number: int) -> bool:
        """Whether a trial is to end after what it has reported last."""
        trial = self._trial(number)
        return patiently(lambda: bool(trial.should_prune()))

    def complete(self, number: int, value: float) -> None:
        """Record that a trial has ended with a value."""
        from optuna.trial import TrialState

        self._put_state(number, TrialState.COMPLETE, [value])

    def prune(self, number: int, reason: str) -> None:
        """Record that a trial was ended ahead of its plan; its value is that of its last evaluation."""
        from optuna.trial import TrialState

        reports = self.trial(number).intermediate_values
        self.note(number, REASON, reason)
        self._put_state(number, TrialState.PRUNED, [reports[max(reports)]] if reports else None)

    def fail(self, number: int, reason: str) -> None:
        """Record that a trial came to nothing."""
        from optuna.trial import TrialState

        self.note(number, REASON, masked(reason))
        self._put_state(number, TrialState.FAIL, None)

    def note(self, number: int, name: str, value: Any) -> None:
        """Keep something with a trial."""
        patiently(lambda: self.storage.set_trial_user_attr(self._id_of(number), name, value))

    def best(self) -> FrozenTrial | None:
        """Return the best trial that has ended as planned; None while there is none."""
        from optuna.trial import TrialState

        found = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE and trial.value is not None]
        sign = -1.0 if self.sweep.spec.metric.goal == "maximize" else 1.0
        return min(found, key=lambda trial: (sign * float(trial.value or 0.0), trial.number), default=None)

    def importances(self) -> dict[str, float]:
        """Return how much each parameter decides of the value, by fANOVA; {} where that can't be said."""
        import optuna

        try:
            # Optuna's default looks at the best tenth of the trials: of a small grid it finds all alike.
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
            return {name: float(part) for name, part in found.items()}
        except (ValueError, RuntimeError, ZeroDivisionError, ImportError):  # too few trials, or all of one value
            return {}

    def _trial(self, number: int) -> Trial:
        """Return a trial that can draw and be pruned, also one that another process has begun."""
        import optuna

        # A sampler for each trial: workers that share a seed would all draw the same, and a trial that is taken up
        # again draws what it would have drawn.
        self._study.sampler = sampler_of(self.sweep.spec, seed_of(self.sweep.seed, number))
        return patiently(lambda: optuna.trial.Trial(self._study, self._id_of(number)))

    def _id_of(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def _put_state(self, number: int, state: Any, values: Sequence[float] | None) -> None:
        def put() -> None:
            if not self.storage.get_trial(self._id_of(number)).state.is_finished():
                self.storage.set_trial_state_values(self._id_of(number), state, values)

        patiently(put)


def make_study(sweep: Sweep) -> None:
    """
    Make the study with all its trials, or see that the one that is there is the same; more trials may be asked for.

    One process does so at a time, and a study that was not made to its end is made anew. Raises ConfigError if the
    study is of another sweep, or if its folder is not here.
    """
    check_optuna()
    leases = Leases(sweep.folder / WORK)
    with leases.alone():
        storage = open_storage(sweep.storage)
        names = patiently(lambda: storage.get_all_studies())
        present = [each for each in names if each.study_name == sweep.name]
        attributes: Mapping[str, Any] = {}
        if present:
            study_id = patiently(lambda: storage.get_study_id_from_name(sweep.name))
            attributes = patiently(lambda: storage.get_study_user_attrs(study_id))
            if MADE not in attributes and _has_begun(storage, study_id):
                raise ConfigError(f"--storage has a study {sweep.name} that is no sweep's: take another --study.")
        if MADE in attributes:
            _check_same(sweep, attributes)
        else:
            if present:  # its maker was killed
                (sweep.folder / STUDY_FILE).unlink(missing_ok=True)
                patiently(lambda: storage.delete_study(study_id))
            _begin(sweep, storage)
        _add_trials(sweep, storage)
        if MADE not in attributes:
            own = storage.get_study_id_from_name(sweep.name)
            patiently(lambda: storage.set_study_user_attr(own, MADE, True))


def _has_begun(storage: Any, study_id: int) -> bool:
    from optuna.trial import TrialState

    trials = patiently(lambda: storage.get_all_trials(study_id, deepcopy=False))
    return any(trial.state != TrialState.WAITING for trial in trials)


def _begin(sweep: Sweep, storage: Any) -> None:
    from optuna.study import StudyDirection, create_study

    path = sweep.folder / STUDY_FILE
    if path.exists():
        found = read_study_file(sweep.folder)
        raise ConfigError(
            f"{sweep.folder} is of the study {found.get('name')} in {found.get('storage')}, and --storage="
            f"{masked(sweep.storage)} has no study {sweep.name}: leave --storage out, or take another --study."
        )
    token = secrets.token_hex(8)
    direction = StudyDirection.MAXIMIZE if sweep.spec.metric.goal == "maximize" else StudyDirection.MINIMIZE
    study = patiently(lambda: create_study(study_name=sweep.name, storage=storage, direction=direction))
    patiently(lambda: study.set_user_attr(TOKEN, token))
    patiently(lambda: study.set_user_attr(SWEEP, sweep.facts()))
    facts = {
        "name": sweep.name,
        "storage": masked(sweep.storage).replace(str(sweep.folder), FOLDER),
        "token": token,
        "method": sweep.spec.method,
        "metric": {"name": sweep.spec.metric.name, "goal": sweep.spec.metric.goal},
        "parameters": [*sweep.spec.parameters],
        "flags": masked([*sweep.flags]),
    }
    write_whole(path, json.dumps(facts, indent=2) + "\n", durable=True)


def read_study_file(folder: Path) -> dict[str, Any]:
    """Return what the folder of a study says of it. Raises ConfigError if there is no study."""
    try:
        found = json.loads((folder / STUDY_FILE).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    raise ConfigError(f"{folder} holds no study: name one that `harness sweep` has begun, or its folder.")


def _check_same(sweep: Sweep, attributes: Mapping[str, Any]) -> None:
    try:
        token = read_study_file(sweep.folder).get("token")
    except ConfigError:
        token = None
    if token != attributes[TOKEN]:
        raise ConfigError(
            f"The study {sweep.name} has its folder elsewhere: {sweep.folder} is another one. All workers need one "
            "folder, to go on with each other's trials: put it where all machines see it, and give --folder."
        )
    before, now = dict(attributes[SWEEP]), sweep.facts()
    if changed := [*differences(before, now)]:
        raise ConfigError(
            f"The study {sweep.name} was begun otherwise: {'; '.join(changed)}. Start it as it was, or take another "
            "--study. (Only run_cap may grow.)"
        )


def differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    """Yield what differs between two mappings, a line for each value."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            yield from differences(before.get(key), now.get(key), f"{at}.{key}" if at else str(key))
    elif before != now:
        yield f"{at} was {json.dumps(before)} and is {json.dumps(now)}"


def _add_trials(sweep: Sweep, storage: Any) -> None:
    """Let as many trials wait as the sweep has; each with the parameters that are settled beforehand."""
    import optuna

    study = patiently(lambda: optuna.load_study(study_name=sweep.name, storage=storage))
    have = len(patiently(lambda: study.get_trials(deepcopy=False)))
    for settled in itertools.islice(settled_points(sweep), have, None):
        _enqueue(study, settled)


def _enqueue(study: Any, settled: Mapping[str, Scalar]) -> None:
    patiently(lambda: study.enqueue_trial(dict(settled)))


def settled_points(sweep: Sweep) -> Iterator[dict[str, Scalar]]:
    """Yield for each trial the parameters that no sampler draws: all of a grid, those with probabilities."""
    parameters = sweep.spec.parameters
    if sweep.spec.method == "grid":
        points = itertools.product(*(each.points() for each in parameters.values()))
        yield from (dict(zip(parameters, point, strict=True)) for point in itertools.islice(points, sweep.count))
        return
    for number in range(sweep.count):
        random = Random(seed_of(sweep.seed, number))
        yield {name: each.draw(random) for name, each in parameters.items() if each.probabilities}


def seed_of(seed: int, number: int) -> int:
    """Return the seed of a trial."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "big")


def sampler_of(spec: Spec, seed: int) -> BaseSampler:
    """Return what draws the parameters of one trial."""
    from optuna.samplers import RandomSampler, TPESampler

    return TPESampler(seed=seed) if spec.method == "bayes" else RandomSampler(seed=seed)


def pruner_of(spec: Spec) -> BasePruner:
    """Return what says whether a trial is worth going on with."""
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

    when = spec.early_terminate
    if when is None:
        return NopPruner()
    if when.type == "median":
        return MedianPruner(n_startup_trials=when.startup_trials, n_warmup_steps=when.warmup_evaluations)
    most: int | str = "auto" if when.high is None else when.high
    return HyperbandPruner(min_resource=when.low, max_resource=most, reduction_factor=when.eta)
