"""A run that is going on is taken over by a start that goes on with it, and by none that is refused itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import resume
from harness.checkpoint import lock as locks
from harness.checkpoint.layout import step_of
from harness.checkpoint.lock import LOCK_FILE, Lock
from harness.checkpoint.manifest import OWN_DIGEST, STATE_FILE, digest_of_manifest
from harness.errors import ConfigError
from harness.files import digest_of
from harness.flags import parse
from harness.resume import Beginning
from harness.train import main
from harness.training.state import TRAINER_STATE_FILE
from tests.support.faulty_training import Training
from tests.support.parity import TASK, TRAINING, as_flags, assert_equal_weights, reset, run_harness

SAVING = {**TRAINING, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
FLAGS = [f"--task={TASK}", "--report_to=none", "--use_cpu"]
# The attempt before, which SLURM thinks dead.
HOLDER = """
import sys
from pathlib import Path
from harness.checkpoint.lock import Lock
with Lock() as lock:
    lock.take(Path(sys.argv[1]))
    print("taken", flush=True)
    sys.stdin.readline()
    print(lock.is_lost(), flush=True)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was ended after its checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_harness(folder, SAVING)
    for path in (folder / "checkpoint-6", folder / "trainer_state.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    return tmp_path / "run"


@contextmanager
def earlier(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "taken\n"
        try:
            yield process
        finally:
            process.kill()


def has_lost(process: subprocess.Popen[str]) -> bool:
    said, _ = process.communicate("\n")
    return {"True": True, "False": False}[said.strip()]


REFUSED: dict[str, dict[str, Any]] = {
    "another learning rate": {"learning_rate": 1e-3},
    "another optimizer": {"optim": "sgd", "allow_changed_arguments": True},
    "a shorter training": {"max_steps": 4},
    "another global batch": {"per_device_train_batch_size": 2},
    "a metric that is nowhere": {"metric_for_best_model": "beauty", "eval_strategy": "epoch"},
    "a task's argument": {"task_args": {"no_such": 1}},
    "another model": {"task_args": {"llama": True}, "allow_changed_arguments": True},
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_start_that_is_refused_takes_nothing(what: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with earlier(run) as process:
        before = (run / LOCK_FILE).read_text()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        flags = {**SAVING, "output_dir": run, "resume_from_checkpoint": "auto", **REFUSED[what]}
        reset()
        assert main([*FLAGS, *as_flags(flags)]) == 2
        assert (run / LOCK_FILE).read_text() == before
        assert not has_lost(process)


def test_a_start_that_goes_on_takes_the_run_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with earlier(run) as process:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        reset()
        assert main([*FLAGS, *as_flags({**SAVING, "output_dir": run, "resume_from_checkpoint": "auto"})]) == 0
        assert has_lost(process)
    assert (run / "checkpoint-6").is_dir()
    assert not (run / LOCK_FILE).exists()


def copy_as(newer: Path, older: Path) -> None:
    """Make a whole checkpoint of another one, of the step that its name says."""
    shutil.copytree(older, newer)
    state, manifest = (json.loads((newer / name).read_text()) for name in (TRAINER_STATE_FILE, STATE_FILE))
    state["global_step"] = manifest["step"] = step_of(newer)
    (newer / TRAINER_STATE_FILE).write_text(json.dumps(state))
    if (facts := manifest["files"].get(TRAINER_STATE_FILE)) is not None:
        file = newer / TRAINER_STATE_FILE
        facts |= {"size": file.stat().st_size, "sha256": digest_of(file)}
    manifest[OWN_DIGEST] = digest_of_manifest(manifest)
    (newer / STATE_FILE).write_text(json.dumps(manifest))


def config_of(run: Path) -> Any:
    return parse([*FLAGS, *as_flags({**SAVING, "output_dir": run, "resume_from_checkpoint": "auto"})])


def test_what_an_earlier_attempt_saved_until_it_was_fenced_is_gone_on_from(run: Path) -> None:
    with Lock() as lock:
        beginning = Beginning(config_of(run), lock)
        assert beginning.is_free()
        found, output_dir = beginning.look()
        assert (found.path, output_dir) == (run / "checkpoint-3", run)
        assert not (run / LOCK_FILE).exists()
        copy_as(run / "checkpoint-5", run / "checkpoint-3")
        assert beginning.claim(accepts=lambda _: None).path == run / "checkpoint-5"
        assert json.loads((run / LOCK_FILE).read_text())["token"] == lock.token


def test_a_folder_that_was_taken_since_it_was_looked_at_is_refused(run: Path) -> None:
    with Lock() as lock:
        beginning = Beginning(config_of(run), lock)
        assert beginning.is_free()
        beginning.look()
        with earlier(run) as process:
            with pytest.raises(ConfigError, match=f"in use by process {process.pid} "):
                beginning.claim(accepts=lambda _: None)
            assert not has_lost(process)


def test_other_ranks_wait_no_longer_than_some_seconds_for_an_answer(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "WATCH_SECONDS", 1.0)
    monkeypatch.setattr(resume, "SECONDS_TO_ANSWER", 0.1)
    caplog.set_level("WARNING")
    (run / LOCK_FILE).write_text(json.dumps({"token": "another's"}))
    with Lock() as lock:
        beginning = Beginning(config_of(run), lock)
        began = time.monotonic()
        assert not beginning.is_free()
        assert time.monotonic() - began < 1.0
        while not beginning.is_free():
            pass
        assert time.monotonic() - began >= 1.0
        assert beginning.look()[0].path == run / "checkpoint-3"
        assert beginning.claim(accepts=lambda _: None).path == run / "checkpoint-3"
        assert not lock.is_lost()
    assert caplog.text.count("watching its heartbeat for 1 s") == 1


@pytest.mark.slow
def test_an_attempt_that_trains_on_is_taken_over_and_nothing_of_its_run_is_lost(tmp_path: Path) -> None:
    """Its node is out of reach; the next attempt begins while it saves."""
    arguments = {"report_to": "none", "wandb_run_id": None, "wandb_log_model": None, "resume_from_checkpoint": "auto"}
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
    first = Training(tmp_path / "first", None, pace=1.0, variables=job, **arguments)
    first.reach(6)
    same = {"task": {"times": str(first.times)}, "pace": first.pace, "output_dir": first.output_dir, **arguments}
    job["SLURM_RESTART_COUNT"] = "1"
    second = Training(tmp_path / "second", None, variables=job, **same)
    first.ended(1)
    assert "Another process has taken over" in first.err
    second.ended(0)
    reference = Training.here(tmp_path / "reference")
    assert_equal_weights(reference.output_dir, first.output_dir)
    assert not (first.output_dir / LOCK_FILE).exists()
