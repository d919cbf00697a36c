"""What a training makes of the SLURM job that it runs in; tests/slurm has the real jobs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.checkpoint.find import in_job as with_job
from harness.checkpoint.flags import CheckpointConfig
from harness.errors import ConfigError
from harness.slurm import FAILED, FINISHED, JOB_FILE, PREEMPTED, JobRecord, SlurmJob, slurm_job, time_limit_at
from harness.train import main
from harness.training.flags import StoppingConfig
from harness.training.stopping import TimeLimit
from tests.support.parity import TRAINING, as_flags
from tests.support.wandb.file import read_all

ROOT = Path(__file__).parent.parent
TASK = "tests.support.tasks.parity_task:build"
FLAGS = {"task": TASK, "report_to": "none", **TRAINING, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}


def in_job(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """As in a batch job; squeue is out of reach, as in a container."""
    monkeypatch.setenv("PATH", "/nonexistent")
    for name, value in {"SLURM_JOB_ID": "77", "ENVIRONMENT": "BATCH", **variables}.items():
        monkeypatch.setenv(name, value)


def test_outside_slurm_there_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm_job() is None
    assert time_limit_at() is None


def test_a_task_of_an_array_is_a_job_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch, SLURM_ARRAY_JOB_ID="75", SLURM_ARRAY_TASK_ID="2", SLURM_RESTART_COUNT="3")
    job = slurm_job()
    assert job is not None
    assert (job.id, job.restart_count, job.output_dir) == ("75_2", 3, Path("runs/job-75_2"))
    assert job.facts()["slurm/job_id"] == "75_2"


@pytest.mark.parametrize(("told", "expected"), [("1795630954", 1795630954.0), ("", None), ("NONE", None)])
def test_without_squeue_the_end_of_the_job_is_that_of_its_variable(
    told: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, SLURM_JOB_END_TIME=told)
    assert time_limit_at() == expected


def test_a_job_has_a_folder_and_a_requeued_one_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (SlurmJob(id="77", restart_count=count, is_batch=True) for count in (0, 1))
    bare, given = CheckpointConfig(), CheckpointConfig(output_dir="here")
    of = [(c.output_dir, c.resume_from_checkpoint) for c in (with_job(bare, first), with_job(bare, second))]
    assert of == [("runs/job-77", None), ("runs/job-77", "auto")]
    assert with_job(given, first) == given
    assert with_job(given, second).resume_from_checkpoint == "auto"
    refused = CheckpointConfig(output_dir="here", resume_from_checkpoint="false")
    assert with_job(refused, second) == refused


def test_a_requeued_job_that_began_with_a_checkpoint_of_another_run_goes_on_with_its_own(tmp_path: Path) -> None:
    job = SlurmJob(id="77", restart_count=1, is_batch=True)
    given = CheckpointConfig(output_dir=str(tmp_path), resume_from_checkpoint="elsewhere/checkpoint-9")
    assert with_job(given, job) == given
    (tmp_path / "checkpoint-12").mkdir()
    assert with_job(given, job).resume_from_checkpoint == "auto"


def test_commands_typed_one_after_the_other_in_an_allocation_have_folders_of_their_own() -> None:
    config = CheckpointConfig()
    assert with_job(config, SlurmJob(id="77", restart_count=0, is_batch=False)) == config


def test_auto_needs_no_folder_in_a_batch_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--output_dir"):
        CheckpointConfig(resume_from_checkpoint="auto")
    in_job(monkeypatch)
    job = slurm_job()
    assert job is not None
    assert with_job(CheckpointConfig(resume_from_checkpoint="auto"), job).output_dir == "runs/job-77"


def record(folder: Path, restart_count: int, job: str = "77") -> JobRecord:
    return JobRecord(folder, SlurmJob(id=job, restart_count=restart_count))


def test_a_job_that_dies_twice_at_the_same_step_is_not_started_a_third_time(tmp_path: Path) -> None:
    record(tmp_path, 0).begin(from_step=20)
    record(tmp_path, 1).begin(from_step=20)
    with pytest.raises(ConfigError, match=r"Job 77 has died 2 times since step 20 .* submit a new job with"):
        record(tmp_path, 2).begin(from_step=20)
    record(tmp_path, 2).begin(from_step=40)  # it got further
    record(tmp_path, 0, job="78").begin(from_step=40)


def test_lives_that_were_preempted_are_no_deaths(tmp_path: Path) -> None:
    for attempt in range(5):
        record(tmp_path, attempt).begin(from_step=20)
        record(tmp_path, attempt).end(PREEMPTED)
    assert [attempt["ended"] for attempt in json.loads((tmp_path / JOB_FILE).read_text())] == [PREEMPTED] * 5


def test_only_the_job_that_finished_is_complete(tmp_path: Path) -> None:
    assert not record(tmp_path, 0).says_finished()
    record(tmp_path, 0).begin(from_step=0)
    record(tmp_path, 0).end(FAILED)
    assert not record(tmp_path, 1).says_finished()
    record(tmp_path, 1).begin(from_step=0)
    record(tmp_path, 1).end(FINISHED)
    assert record(tmp_path, 2).says_finished()
    assert not record(tmp_path, 0, job="78").says_finished()


def test_a_second_command_in_the_same_life_is_run(tmp_path: Path) -> None:
    for end in (FINISHED, FAILED, FAILED, FAILED):
        assert not record(tmp_path, 0).says_finished()
        record(tmp_path, 0).begin(from_step=0)
        record(tmp_path, 0).end(end)


def test_a_record_that_can_not_be_read_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / JOB_FILE).write_text("{")
    record(tmp_path, 0).begin(from_step=0)
    assert len(json.loads((tmp_path / JOB_FILE).read_text())) == 1


def test_the_time_limit_is_near_when_step_save_and_margin_no_longer_fit() -> None:
    now = time.time()
    ends = [now + 100.0]
    limit = TimeLimit(StoppingConfig(time_limit_margin_seconds=60.0), ends_at=lambda: ends[0], to_save=lambda: saves[0])
    saves = [0.0]
    assert not limit.is_near(steps_ahead=0)
    saves = [45.0]
    assert limit.is_near(steps_ahead=0)
    ends = [now + 3600.0]  # somebody has extended it
    assert not limit.is_near(steps_ahead=0)


def test_a_margin_of_zero_leaves_the_limit_alone() -> None:
    asked: list[int] = []
    limit = TimeLimit(
        StoppingConfig(time_limit_margin_seconds=0.0), ends_at=lambda: asked.append(1), to_save=lambda: 0.0
    )
    assert not limit.is_near(steps_ahead=1)
    assert not asked


def test_a_training_in_a_job_records_it_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    in_job(monkeypatch, SLURM_JOB_PARTITION="gpu", SLURM_JOB_NODELIST="a[1-4]")
    flags = as_flags({**FLAGS, "report_to": "wandb"})
    assert main(flags) == 0
    folder = tmp_path / "runs" / "job-77"
    (attempt,) = json.loads((folder / JOB_FILE).read_text())
    assert (attempt["partition"], attempt["nodes"], attempt["from_step"], attempt["ended"]) == (
        "gpu",
        "a[1-4]",
        0,
        "finished",
    )
    (run,) = read_all(folder)
    assert (run.config["slurm/job_id"], run.config["slurm/restart_count"]) == ("77", 0)
    assert (run.config["slurm/partition"], run.config["slurm/nodes"]) == ("gpu", "a[1-4]")
    before = (folder / "trainer_state.json").stat().st_mtime_ns
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(flags) == 0
    assert "The training of this job is complete, there is nothing left to do" in capsys.readouterr().err
    assert (folder / "trainer_state.json").stat().st_mtime_ns == before


def test_a_training_stops_ahead_of_the_time_limit_and_goes_on_in_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    in_job(monkeypatch, SLURM_JOB_END_TIME=str(int(time.time()) + 50))
    assert main(as_flags(FLAGS)) == 85
    assert "The job's time limit is near: stopped at step 1 of 6: saved" in capsys.readouterr().err
    folder = tmp_path / "runs" / "job-77"
    assert (folder / "preempted").is_file()
    in_job(monkeypatch, SLURM_JOB_END_TIME=str(int(time.time()) + 5000), SLURM_RESTART_COUNT="1")
    assert main(as_flags(FLAGS)) == 0
    assert "Going on from runs/job-77/checkpoint-1, step 1 of 6" in capsys.readouterr().out
    assert [attempt["ended"] for attempt in json.loads((folder / JOB_FILE).read_text())] == ["preempted", "finished"]


def test_where_nothing_is_saved_the_time_limit_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    in_job(monkeypatch, SLURM_JOB_END_TIME=str(int(time.time()) + 50))
    assert main(as_flags({**FLAGS, "save_strategy": "no"})) == 0


@pytest.mark.slow
def test_a_signal_that_comes_while_the_training_starts_is_not_lost(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "harness" / "train.py"), *as_flags({**FLAGS, "output_dir": tmp_path / "run"})]
    bash = shutil.which("bash")
    assert bash
    process = subprocess.Popen(
        [bash, "-c", 'trap "" USR1; exec "$@"', "-", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    time.sleep(0.7)  # Python runs, its imports take seconds
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 85, err
    assert "Preempted at step 1 of 6: saved" in err
