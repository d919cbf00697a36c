"""A study is made once, whoever begins; each trial is worked on by one at a time, and those of the dead go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.errors import ConfigError
from harness.sweep.recall import recalled
from harness.sweep.show import best_config, summary_of, table_of
from harness.sweep.spec import spec_of
from harness.sweep.storage import default_storage, open_storage
from harness.sweep.study import MADE, Study, Sweep, make_study, settled_points

ROOT = Path(__file__).parents[2]
LOSS = {"name": "eval/loss", "goal": "minimize"}
GRID: dict[str, Any] = {
    "method": "grid",
    "metric": LOSS,
    "parameters": {"learning_rate": {"values": [0.1, 0.01, 0.001]}, "seed": {"values": [1, 2]}},
}
TPE: dict[str, Any] = {"method": "bayes", "metric": LOSS, "parameters": {"learning_rate": {"min": 0.0, "max": 1.0}}}


def sweep(folder: Path, *, journal: bool = False, given: dict[str, Any] | None = None, **more: Any) -> Sweep:
    spec = spec_of({**GRID, **(given or {})}, name="s")
    count = more.pop("count", 6)
    storage = default_storage(folder, is_shared=journal)
    return Sweep(spec=spec, name="s", folder=folder, storage=storage, count=count, **more)


OTHER_PROCESS = """
import sys, time
from pathlib import Path
from tests.sweep.test_study import GRID, TPE, sweep
from harness.sweep.study import Study, make_study

folder, journal, what = Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3]
own = sweep(folder, journal=journal, given=GRID if what == "make" else TPE)
if what == "make":
    sys.stdin.read(1)
    make_study(own)
study = Study(own)
claims = []
while len(claims) < int(sys.argv[4]) and (claim := study.claim()) is not None:
    claims.append(claim)
    study.values_of(claim.number)
print(*[claim.number for claim in claims], flush=True)
sys.stdin.read()
"""


class Others:
    """Processes that make the study, or claim trials, and then wait to be ended."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, folder: Path, what: str, most: int, *, journal: bool) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OTHER_PROCESS, str(folder), str(journal), what, str(most)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        return process


@pytest.fixture
def others() -> Iterator[Others]:
    found = Others()
    yield found
    for process in found.processes:
        process.kill()
        process.communicate()


def claimed(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


@pytest.mark.slow
@pytest.mark.parametrize("journal", [False, True], ids=["sqlite", "journal"])
def test_two_that_begin_at_once_make_one_study_and_share_its_trials(
    tmp_path: Path, others: Others, journal: bool
) -> None:
    pair = [others.start(tmp_path / "s", "make", 4, journal=journal) for _ in range(2)]
    for process in pair:
        assert process.stdin is not None
        process.stdin.write("go")
        process.stdin.flush()
    assert sorted(number for process in pair for number in claimed(process)) == [0, 1, 2, 3, 4, 5]
    study = Study(sweep(tmp_path / "s", journal=journal))
    assert len(study.trials()) == 6
    assert len({(trial.params["learning_rate"], trial.params["seed"]) for trial in study.trials()}) == 6
    assert study.claim() is None
    assert not study.is_over()


@pytest.mark.slow
def test_the_trial_of_a_dead_worker_goes_on_under_its_number(tmp_path: Path, others: Others) -> None:
    make_study(sweep(tmp_path / "s", given=TPE))
    study = Study(sweep(tmp_path / "s", given=TPE))
    claim = study.claim()
    assert claim is not None
    assert claim.number == 0
    value = study.values_of(0)
    study.report(0, 1, 0.5)
    claim.lease.release()  # as if its process had died
    process = others.start(tmp_path / "s", "claim", 1, journal=False)
    assert claimed(process) == [0]
    later = study.claim()
    assert later is not None
    assert later.number == 1
    later.lease.release()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = study.claim()
    assert again is not None
    assert again.number == 0
    assert study.values_of(0) == value
    assert study.trial(0).intermediate_values == {1: 0.5}
    again.lease.release()


def test_a_study_whose_maker_was_killed_is_made_anew(tmp_path: Path) -> None:
    small = sweep(tmp_path / "s", count=2)
    make_study(small)
    storage = open_storage(small.storage)
    study_id = storage.get_study_id_from_name("s")
    storage.set_study_user_attr(study_id, MADE, False)
    attributes = {name: value for name, value in storage.get_study_user_attrs(study_id).items() if name != MADE}
    storage.delete_study(study_id)
    half = storage.create_new_study(directions=[storage_direction()], study_name="s")
    for name, value in attributes.items():
        storage.set_study_user_attr(half, name, value)
    make_study(sweep(tmp_path / "s"))
    assert len(Study(sweep(tmp_path / "s")).trials()) == 6


def storage_direction() -> Any:
    from optuna.study import StudyDirection

    return StudyDirection.MINIMIZE


def test_a_second_start_goes_on_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    make_study(sweep(folder, count=2, arguments={"max_steps": 20}))
    make_study(sweep(folder, count=4, arguments={"max_steps": 20}))
    assert len(Study(sweep(folder)).trials()) == 4
    other = {"parameters": {**GRID["parameters"], "learning_rate": {"values": [0.5]}}}
    with pytest.raises(ConfigError, match=r"learning_rate\.values was \[0\.1, 0\.01, 0\.001\] and is \[0\.5\]"):
        make_study(sweep(folder, given=other, arguments={"max_steps": 20}))
    with pytest.raises(ConfigError, match=r'flags\.max_steps was 20 and is "30".*another --study'):
        make_study(sweep(folder, arguments={"max_steps": "30"}))
    elsewhere = sweep(tmp_path / "t", arguments={"max_steps": 20})
    same_storage = Sweep(**{**vars(elsewhere), "storage": sweep(folder).storage})
    with pytest.raises(ConfigError, match="has its folder elsewhere"):
        make_study(same_storage)


def test_random_trials_have_each_their_own_seed_whoever_draws(tmp_path: Path) -> None:
    at_random = {**TPE, "method": "random"}
    found = []
    for name in ("a", "b"):
        made = sweep(tmp_path / name, given=at_random, count=4)
        make_study(made)
        study = Study(made)
        order = [0, 1, 2, 3] if name == "a" else [3, 1, 0, 2]
        found.append({number: study.values_of(number) for number in order})
    assert found[0] == found[1]
    assert len({values["learning_rate"] for values in found[0].values()}) == 4


def test_trials_end_when_one_is_good_enough_or_all_fail(tmp_path: Path) -> None:
    good = sweep(tmp_path / "good", given={"metric": {**LOSS, "target": 1.0}})
    make_study(good)
    study = Study(good)
    for number, value in ((0, 2.0), (1, 0.9)):
        claim = study.claim()
        assert claim is not None
        assert claim.number == number
        study.complete(number, value)
        claim.lease.release()
    assert study.claim() is None
    assert study.is_over()
    bad = sweep(tmp_path / "bad")
    make_study(bad)
    study = Study(bad)
    for number in range(3):
        claim = study.claim()
        assert claim is not None
        study.fail(number, "as all do")
        claim.lease.release()
    assert study.claim() is None
    assert study.is_over()
    assert study.best() is None


def test_a_small_grid_tells_which_parameter_mattered(tmp_path: Path) -> None:
    made = sweep(tmp_path / "s", flags=["--max_steps=20", "--eval_strategy=steps"])
    make_study(made)
    study = Study(made)
    while (claim := study.claim()) is not None:
        number = claim.number
        study.complete(number, 10 * study.values_of(number)["learning_rate"] + 1e-3 * number)
        claim.lease.release()
    parts = study.importances()
    assert parts.keys() == {"learning_rate", "seed"}
    assert parts["learning_rate"] > 0.75


def test_what_is_shown_of_a_study(tmp_path: Path) -> None:
    made = sweep(tmp_path / "s", flags=["--max_steps=20", "--eval_strategy=steps"])
    make_study(made)
    study = Study(made)
    for number, value in enumerate((3.0, 1.5, 2.0, 2.5)):
        claim = study.claim()
        assert claim is not None
        study.values_of(number)
        study.report(number, 1, value)
        if number == 2:
            study.prune(number, "at step 5, eval/loss 2")
        elif number == 3:
            study.fail(number, "exit code 1: no memory")
        else:
            study.complete(number, value)
        claim.lease.release()
    shown = Study(recalled(str(tmp_path / "s"), None))
    lines = table_of(shown).splitlines()
    assert lines[0].split() == ["trial", "state", "eval/loss", "step", "learning_rate", "seed"]
    assert lines[2].split() == ["1", "complete", "1.5", "0.1", "2"]
    assert lines[3].split() == ["2", "pruned", "2", "0.01", "1", "at", "step", "5,", "eval/loss", "2"]
    assert "exit code 1: no memory" in lines[4]
    summary = summary_of(shown)
    assert "2 complete, 1 pruned, 1 failed, 2 waiting" in summary
    assert "best: trial 1, eval/loss 1.5: --learning_rate=0.1 --seed=2" in summary
    written = best_config(shown)
    assert "max_steps: 20" in written
    assert "learning_rate: 0.1" in written
    assert "seed: 2" in written
    assert "output_dir" not in written
    assert len([*settled_points(made)]) == 6
