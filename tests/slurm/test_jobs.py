"""Jobs of the shipped scripts on a real SLURM: each ends as the run that it would have been without SLURM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.compare import Verdict, compare_rows
from tests.slurm.jobs import Job
from tests.slurm.scenarios import Scenarios
from tests.support.parity import assert_equal_runs
from tests.support.wandb_server import WandbServer
from tests.support.wandb_server.records import RunRecord

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(450)]


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenarios]:
    folder = tmp_path_factory.mktemp("slurm")
    with WandbServer(folder / "server") as server:
        scenarios = Scenarios(folder, server)
        scenarios.start()
        yield scenarios
        scenarios.stop()


def the_run(scenarios: Scenarios, project: str) -> RunRecord:
    (run,) = [run for run in scenarios.server.runs() if run.project == project]
    return run


def assert_same_run(scenarios: Scenarios, reference: Path, job: Job, *, restarts: int) -> None:
    """Weights and history to the bit; one run in W&B with the same rows, finished; the job as it says it is."""
    assert job.restarts == restarts
    assert_equal_runs(reference, job.output_dir)
    expected, run = the_run(scenarios, reference.parent.name), the_run(scenarios, job.folder.name)
    verdict = Verdict()
    compare_rows(expected.rows, run.rows, verdict=verdict)
    assert verdict.is_good, verdict.details
    assert len(run.rows) == len(expected.rows) > 32
    assert (run.state, run.exit_code) == ("finished", 0)
    assert run.config["slurm/job_id"] == job.id
    assert run.config["slurm/partition"] in ("main", "failing")
    assert not [path.name for path in job.output_dir.iterdir() if path.name.endswith((".partial", ".tmp"))]
    assert not (job.output_dir / "preempted").exists()


def attempts(job: Job) -> list[dict[str, object]]:
    return list(json.loads((job.output_dir / "slurm.json").read_text(encoding="utf-8")))


def ends(job: Job) -> list[object]:
    return [attempt["ended"] for attempt in attempts(job)]


def resumed_from(job: Job) -> int:
    (line,) = [line for line in job.output.splitlines() if line.startswith("Going on from ")]
    return int(line.split(", step ")[1].split(" of ")[0])


def test_a_requeued_job_goes_on_and_a_finished_one_is_not_run_again(scenarios: Scenarios) -> None:
    job = scenarios.result(scenarios.requeued_and_finished)
    assert_same_run(scenarios, scenarios.result(scenarios.reference_of_two), job, restarts=2)
    assert "2 processes on n[1-2]" in job.output
    assert job.output.count("The training of this job is complete, there is nothing left to do") == 1
    assert [attempt["restart_count"] for attempt in attempts(job)] == [0, 1]
    assert ends(job)[-1] == "finished"
    assert resumed_from(job) >= 20
    run = the_run(scenarios, "requeued_and_finished")
    assert (run.config["slurm/restart_count"], run.config["slurm/nodes"]) == (1, "n[1-2]")


def test_usr1_before_the_time_limit_saves_and_requeues(scenarios: Scenarios) -> None:
    job = scenarios.result(scenarios.signal_before_the_time_limit)
    assert_same_run(scenarios, scenarios.result(scenarios.reference_of_two), job, restarts=1)
    assert ends(job) == ["preempted", "finished"]
    assert "harness train: Preempted at step" in job.output
    assert f"Job {job.id} was preempted after a save: requeued." in job.output


def test_the_time_limit_is_known_without_a_signal(scenarios: Scenarios) -> None:
    job = scenarios.result(scenarios.own_time_limit)
    assert_same_run(scenarios, scenarios.result(scenarios.reference_of_two), job, restarts=1)
    assert ends(job) == ["preempted", "finished"]
    assert "harness train: The job's time limit is near: stopped at step" in job.output
    assert "2 processes on n" in job.output


def test_sigterm_saves_and_requeues_offline_as_well(scenarios: Scenarios) -> None:
    job = scenarios.result(scenarios.terminated_offline)
    assert_same_run(scenarios, scenarios.result(scenarios.reference_of_two), job, restarts=1)
    assert ends(job) == ["preempted", "finished"]
    assert resumed_from(job) not in (0, 20, 40)


def test_a_failed_node_costs_what_was_trained_since_the_last_checkpoint(scenarios: Scenarios) -> None:
    job = scenarios.result(scenarios.failed_node)
    assert_same_run(scenarios, scenarios.result(scenarios.reference_of_two), job, restarts=1)
    assert ends(job)[-1] == "finished"
    assert "preempted" not in ends(job)


def test_a_rank_that_survives_its_node_does_no_harm(scenarios: Scenarios) -> None:
    job, steps_beside = scenarios.result(scenarios.surviving_rank)
    assert steps_beside > 0, "the old rank did not outlive its node"
    assert_same_run(scenarios, scenarios.result(scenarios.reference_of_one), job, restarts=1)
    assert ends(job)[-1] == "finished"


def test_tasks_of_an_array_are_runs_of_one_group(scenarios: Scenarios) -> None:
    tasks = scenarios.result(scenarios.array)
    runs = [run for run in scenarios.server.runs() if run.project == "array"]
    array = tasks[0].id.partition("_")[0]
    assert {run.group for run in runs} == {f"array-{array}"}
    assert sorted(run.config["slurm/job_id"] for run in runs) == [task.id for task in tasks]
    assert sorted(run.config["seed"] for run in runs) == [0, 1, 2]
    assert {run.state for run in runs} == {"finished"}
    weights = {(task.output_dir / "model.safetensors").read_bytes() for task in tasks}
    assert len(weights) == 3
    # All that they wrote is in the folders of the tasks, in W&B's of each, and what the test's task tells.
    names = {path.name for path in tasks[0].folder.iterdir()}
    assert names == {"runs", "steps", *(f"slurm-{task.id}.out" for task in tasks)}
    assert {path.name for path in (tasks[0].folder / "runs").iterdir()} == {task.output_dir.name for task in tasks}


def test_zero2_on_two_nodes_is_what_it_is_without_slurm(scenarios: Scenarios) -> None:
    job = scenarios.result(scenarios.zero)
    assert_same_run(scenarios, scenarios.result(scenarios.zero_reference), job, restarts=0)
    assert json.loads((job.output_dir / "checkpoint-160" / "harness_state.json").read_text())["zero_stage"] == 2
    assert "2 processes on n[1-2]" in job.output


def test_a_training_that_raises_is_not_requeued(scenarios: Scenarios) -> None:
    job = scenarios.result(scenarios.raising)
    assert job.restarts == 0
    assert "ZeroDivisionError: as the test wants it" in job.output
    assert ends(job) == ["failed"]
    assert the_run(scenarios, "raising").state == "failed"


def test_requeues_are_bounded(scenarios: Scenarios) -> None:
    job = scenarios.result(scenarios.bounded)
    assert job.restarts == 0
    assert "(MAX_REQUEUES): not once more" in job.output
    assert ends(job) == ["preempted"]


def test_a_cancelled_job_is_saved_and_not_requeued(scenarios: Scenarios) -> None:
    job = scenarios.result(scenarios.cancelled)
    assert job.restarts == 0
    assert ends(job) == ["preempted"]
    assert job.field("JobState") == "CANCELLED"


def test_unequal_nodes_are_refused(scenarios: Scenarios) -> None:
    job = scenarios.result(scenarios.unequal)
    assert "the nodes are unequal, ask for the same of each" in job.output
    assert "2 GPUs, 1 CPUs" in job.output
    assert not job.output_dir.exists()


def test_the_script_for_debugging_works_in_an_allocation(scenarios: Scenarios) -> None:
    ended = scenarios.result(scenarios.at_a_terminal)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (folder,) = (scenarios.folder / "at_a_terminal" / "runs").iterdir()
    assert folder.name.startswith("debug-")
    assert (folder / "model.safetensors").is_file()
    assert "debug: 'on'" in (folder / "harness_config.yaml").read_text(encoding="utf-8")
