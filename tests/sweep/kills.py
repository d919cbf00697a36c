"""
Kill trainings, workers and the driver of a sweep, and count: `python -m tests.sweep.kills FOLDER [KILLS]`.

It is a sweep of 12 trials with 2 workers. SIGKILL comes to a training, a worker and the driver, KILLS times each, at
moments drawn from a seed; whatever of the workers is left ends by itself, and the driver is started again until the
study is over. Then each step has to be made once, each trial to have one number, and the best to be the plain run of
its flags to the last bit. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from harness.files import digest_of
from harness.sweep.show import write_best
from tests.support.faulty_training import environment
from tests.sweep.sweeping import FLAGS, ROOT, Sweeping, attempts_of, paced, run_of, steps_of, study_of, write

TRIALS, STEPS, WORKERS = 12, 24, 2
SECONDS_BETWEEN_KILLS = (0.5, 4.0)
METHODS: dict[str, dict[str, Any]] = {
    "grid": {
        "method": "grid",
        "parameters": {"learning_rate": {"values": [10 ** (-1 - i / 4) for i in range(TRIALS)]}},
    },
    "bayes": {
        "method": "bayes",
        "run_cap": TRIALS,
        "parameters": {"learning_rate": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1}},
        "early_terminate": {"type": "median", "startup_trials": 3},
    },
}


def play(folder: Path, kills: int, *, method: str = "grid", trials: int = TRIALS, seed: int = 0) -> list[str]:
    """Play one sweep to its end; returns what is wrong with what it leaves."""
    write(folder, **METHODS[method])
    flags = {**FLAGS, **paced(folder, 0.8), "max_steps": STEPS, "save_steps": 2, "learning_rate": None}
    rng, left = random.Random(seed), Counter({"training": kills, "worker": kills, "driver": kills})
    options = ["--workers=2", f"--count={trials}"]
    sweep = Sweeping(folder, *options, flags=flags)
    while sweep.process.poll() is None or any(left.values()) or not study_of(folder).is_over():
        if sweep.process.poll() is not None:
            if study_of(folder).is_over():
                break
            sweep = Sweeping(folder, *options, flags=flags)
        time.sleep(rng.uniform(*SECONDS_BETWEEN_KILLS))
        if any(left.values()) and _kill(sweep, victim := rng.choices([*left], weights=[*left.values()])[0]):
            left[victim] -= 1
            print(f"{victim} killed, left {dict(left)}", flush=True)
    wrong = [f"{number} kills of {name} found nobody" for name, number in left.items() if number]
    return wrong + differences(folder, trials, flags)


def _kill(sweep: Sweeping, victim: str) -> bool:
    """Kill one of these, if there is one now that is at work."""
    with contextlib.suppress(psutil.Error, ProcessLookupError, IndexError, AssertionError):
        workers = sweep.workers()
        if victim == "driver":
            found = [sweep.process.pid] if workers else []
        elif victim == "worker":
            found = workers
        else:
            found = [child.pid for worker in workers for child in psutil.Process(worker).children()]
            found = [pid for pid in found if pid not in _often_killed(sweep.folder)]
        number = random.choice(found)
        os.kill(number, signal.SIGKILL)
        if victim == "driver":
            sweep.process.wait(60)
        return True
    return False


def _often_killed(folder: Path) -> set[int]:
    """The trainings of trials that fail if they are killed a third time since one checkpoint, as is right."""
    found = set()
    for number in range(TRIALS):
        attempts = attempts_of(folder, number)
        ends = {(each.get("how"), each.get("left")) for each in attempts[-3:-1]}
        if len(attempts) > 2 and len(ends) == 1 and ("killed" in next(iter(ends))):
            found.add(attempts[-1]["pid"])
    return found


def differences(folder: Path, trials: int, flags: dict[str, Any]) -> list[str]:
    """What is not as it has to be: steps, numbers, the best beside its plain run."""
    study, wrong = study_of(folder), []
    found = study.trials()
    if len(found) != trials:
        wrong.append(f"{len(found)} trials, not {trials}")
    if len({trial.params["learning_rate"] for trial in found}) != len(found):
        wrong.append("a trial was made twice")
    made = 0
    for trial in found:
        steps = steps_of(run_of(folder, trial.number))
        made += len(steps)
        end = STEPS if trial.state.name == "COMPLETE" else steps[-1] if steps else 0
        if trial.state.name not in ("COMPLETE", "PRUNED") or steps != list(range(1, end + 1)):
            wrong.append(f"trial {trial.number} is {trial.state.name} {trial.user_attrs} with steps {steps}")
        if trial.state.name == "PRUNED" and end != FLAGS["eval_steps"] * max(trial.intermediate_values):
            wrong.append(f"trial {trial.number} was pruned at step {end}, evaluated {trial.intermediate_values}")
    attempts = sum(len(attempts_of(folder, trial.number)) for trial in found)
    print(f"{len(found)} trials, {made} steps, {attempts} attempts, {Counter(each.state.name for each in found)}")
    best = study.best()
    assert best is not None
    write_best(study, folder / "best.yaml")
    command = [sys.executable, "-m", "harness", "train", "--config", str(folder / "best.yaml")]
    variables = {**environment(folder, None), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "plain.log").open("w") as log:
        subprocess.run(
            [*command, "--output_dir", str(folder / "plain")], env=variables, stdout=log, stderr=log, check=True
        )
    weights = [where / "model.safetensors" for where in (folder / "plain", run_of(folder, best.number))]
    if digest_of(weights[0]) != digest_of(weights[1]):
        wrong.append(f"the best, trial {best.number}, is not its plain run")
    return wrong


if __name__ == "__main__":
    number = int(sys.argv[2]) if len(sys.argv) > 2 else 10
    failed = False
    for name in METHODS:
        began = time.monotonic()
        problems = play(Path(sys.argv[1]) / name, number, method=name)
        print(
            f"{name}: {3 * number} kills in {time.monotonic() - began:.0f} s: {problems or 'nothing differs'}",
            flush=True,
        )
        failed = failed or bool(problems)
    sys.exit(1 if failed else 0)
