"""Whole sweeps: each trial is a run like any other, made once whatever dies, and the best is what a plain run is."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from harness.__main__ import main as harness
from harness.files import digest_of
from harness.train import main
from tests.support.launching import free_port
from tests.support.parity import reset
from tests.support.wandb_server import WandbServer
from tests.sweep.sweeping import (
    FORKED,
    Sweeping,
    attempts_of,
    environment_of,
    kill_training,
    paced,
    run_of,
    states_of,
    steps_of,
    study_of,
    write,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ALL = list(range(1, 13))


def test_a_grid_is_trained_once_and_its_best_is_the_plain_run_of_its_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, method="grid", parameters={"learning_rate": {"values": [1e-4, 1e-3, 1e-2]}, "seed": {"value": 1}})
    flags = {"learning_rate": None}
    sweep = Sweeping(tmp_path, "--workers=2", "--best_config=best.yaml", flags=flags).ended()
    assert states_of(tmp_path) == ["COMPLETE"] * 3
    assert [steps_of(run_of(tmp_path, number)) for number in range(3)] == [ALL] * 3
    assert "3 complete" in sweep.out
    best = study_of(tmp_path).best()
    assert best is not None
    assert best.value == min(trial.value or 0.0 for trial in study_of(tmp_path).trials())
    # As the plain run is: `--config` has all that decides.
    reset()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["--config", str(tmp_path / "best.yaml"), "--output_dir", str(tmp_path / "plain")]) == 0
    weights = [folder / "model.safetensors" for folder in (tmp_path / "plain", run_of(tmp_path, best.number))]
    assert digest_of(weights[0]) == digest_of(weights[1])
    # The same again has nothing left to do; another file is another study.
    Sweeping(tmp_path, "--workers=2", flags=flags).ended()
    assert [len(attempts_of(tmp_path, number)) for number in range(3)] == [1] * 3
    write(tmp_path, method="grid", parameters={"learning_rate": {"values": [1e-3]}, "seed": {"value": 1}})
    refused = Sweeping(tmp_path, flags=flags).ended(2)
    assert "learning_rate.values was [0.0001, 0.001, 0.01] and is [0.001]" in refused.err
    capsys.readouterr()
    assert harness(["sweep", "--show", str(tmp_path / "runs" / "s")]) == 0
    assert "best: trial" in capsys.readouterr().out


def test_deaths_of_trial_worker_and_driver_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    write(tmp_path, method="grid", parameters={"learning_rate": {"values": [1e-4, 1e-3, 1e-2]}})
    flags = {"learning_rate": None, **paced(tmp_path, 0.3)}
    sweep = Sweeping(tmp_path, "--workers=2", flags=flags, CUDA_VISIBLE_DEVICES="4,5,6,7")
    sweep.wait_for(lambda: all(6 in steps_of(run_of(tmp_path, number)) for number in (0, 1)), "both trials")
    assert {environment_of(tmp_path, number)["CUDA_VISIBLE_DEVICES"] for number in (0, 1)} == {"4,5", "6,7"}
    kill_training(tmp_path, 0)
    sweep.wait_for(lambda: len(attempts_of(tmp_path, 0)) == 2, "trial 0 again")
    os.kill(sweep.workers()[1], signal.SIGKILL)
    sweep.wait_for(lambda: "was killed by signal 9" in sweep.err, "word of the worker")
    sweep.wait_for(lambda: 5 in steps_of(run_of(tmp_path, 0)), "trial 0")
    os.kill(sweep.process.pid, signal.SIGKILL)
    sweep.process.wait(60)
    again = Sweeping(tmp_path, "--workers=2", flags=flags).ended()
    assert "goes on: learning_rate=" in again.out
    assert states_of(tmp_path) == ["COMPLETE"] * 3
    assert [steps_of(run_of(tmp_path, number)) for number in range(3)] == [ALL] * 3


def test_workers_end_whose_driver_dies_while_they_start(tmp_path: Path) -> None:
    write(tmp_path, method="grid", parameters={"learning_rate": {"values": [1e-4, 1e-3]}})
    sweep = Sweeping(tmp_path, "--workers=2", flags={"learning_rate": None, **paced(tmp_path, 0.5)})
    workers = sweep.wait_for(lambda: found if len(found := sweep.workers()) == 2 else None, "two workers")
    os.kill(sweep.process.pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while any(is_at_work(pid) for pid in workers):
        assert time.monotonic() < end, "a worker goes on without its driver"
        time.sleep(0.1)
    assert "COMPLETE" not in states_of(tmp_path)


def is_at_work(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def test_a_trial_is_pruned_at_the_step_of_an_evaluation_and_a_stop_saves(tmp_path: Path) -> None:
    """Its W&B run has ended as planned, and says that it was pruned; SIGTERM to the driver saves the trial."""
    early = {"type": "median", "startup_trials": 1}
    rates = [1e-4, 10.0, 1e-3]
    write(tmp_path, method="grid", parameters={"learning_rate": {"values": rates}}, early_terminate=early)
    with WandbServer(tmp_path / "server") as server:
        flags = {"learning_rate": None, "report_to": "wandb", **paced(tmp_path, 0.1)}
        sweep = Sweeping(tmp_path, server=server, flags=flags)
        sweep.wait_for(lambda: 2 in steps_of(run_of(tmp_path, 2)), "trial 2")
        os.kill(sweep.process.pid, signal.SIGTERM)
        sweep.ended(85)
        assert "Stopped: the trials are saved; go on with: harness sweep" in sweep.err
        Sweeping(tmp_path, server=server, flags=flags).ended()
        runs = {run.name: run for run in server.runs()}
    assert set(runs) == {"s-0", "s-1", "s-2"}
    assert {run.group for run in runs.values()} == {"s"}
    assert {(run.state, run.exit_code) for run in runs.values()} == {("finished", 0)}
    assert [runs[f"s-{number}"].config["learning_rate"] for number in range(3)] == rates
    states = states_of(tmp_path)
    assert states[0] == "COMPLETE"
    assert states[1] == "PRUNED"
    for number, state in enumerate(states):
        run, steps = runs[f"s-{number}"], steps_of(run_of(tmp_path, number))
        end = run.summary.get("sweep/pruned_at_step")
        assert (end is None) == (state == "COMPLETE")
        assert steps == list(range(1, (end or 12) + 1))
        assert len([row for row in run.rows if "train/loss" in row]) == len(steps)
    assert runs["s-1"].summary["sweep/pruned_at_step"] == 4
    reason = study_of(tmp_path).trial(1).user_attrs["reason"]
    assert reason.startswith("at step 4, eval/loss ")


def test_a_trial_of_two_processes_is_pruned_at_the_same_step(tmp_path: Path) -> None:
    early = {"type": "median", "startup_trials": 1}
    write(tmp_path, method="grid", parameters={"learning_rate": {"values": [1e-4, 10.0]}}, early_terminate=early)
    launcher = f"{FORKED} -m torch.distributed.run --nproc_per_node=2 --master_port={free_port()}"
    flags = {"learning_rate": None, "per_device_train_batch_size": 4, "ddp_find_unused_parameters": False}
    Sweeping(tmp_path, flags=flags, launcher=launcher).ended()
    assert states_of(tmp_path) == ["COMPLETE", "PRUNED"]
    assert [steps_of(run_of(tmp_path, number)) for number in range(2)] == [ALL, [1, 2, 3, 4]]


def test_a_trial_that_fails_says_why_and_when_all_do_the_sweep_ends(tmp_path: Path) -> None:
    write(tmp_path, method="random", run_cap=5, parameters={"metric_for_best_model": {"values": ["no", "none"]}})
    sweep = Sweeping(tmp_path).ended(1)
    assert states_of(tmp_path) == ["FAIL"] * 3 + ["WAITING"] * 2
    assert "is in no evaluation; there are: eval_accuracy" in sweep.out
    assert "is in no evaluation; there are: eval_accuracy" in study_of(tmp_path).trial(0).user_attrs["reason"]
    assert "No trial has ended as planned" in sweep.err
