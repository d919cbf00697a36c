"""A training that is killed and started again is one run in W&B: each row once, online and offline."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.faulty_training import Training
from tests.support.wandb.seen import _untimed
from tests.support.wandb_server import RunRecord, WandbServer

pytestmark = pytest.mark.slow

ARGUMENTS: dict[str, Any] = {
    "wandb_run_id": None,
    "wandb_log_model": None,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "resume_from_checkpoint": "auto",
}
# The same in each attempt: it is an argument of the task.
PACE = 0.12
ROWS = 30 + 6 + 1  # a log a step, six evaluations, the end


def begun(folder: Path, server: WandbServer | None, *, pace: float = PACE, **more: Any) -> Training:
    """An attempt of the training in `folder`; offline without a server."""
    (folder / "times").unlink(missing_ok=True)
    variables = {"WANDB_SILENT": "true", **more.pop("variables", {})}
    return Training(folder, server, pace=pace, variables=variables, **{**ARGUMENTS, **more})


def children(training: Training) -> list[psutil.Process]:
    """Wandb's processes."""
    found = [each for each in psutil.Process(training.process.pid).children(recursive=True) if "wandb" in each.name()]
    return [each for each in found if each.status() != psutil.STATUS_ZOMBIE]


def kill(training: Training, what: str) -> None:
    """SIGKILL to all processes, to the training alone, or to wandb's."""
    cores = children(training)
    assert cores
    if what == "core":
        for core in cores:
            core.kill()
        return
    if what == "all":
        os.killpg(training.process.pid, signal.SIGKILL)
    training.process.kill()
    training.process.wait()


def rows(run: RunRecord) -> list[dict[str, Any]]:
    return [_untimed(row) for row in run.rows]


def identity(training: Training) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((training.output_dir / "wandb_run.json").read_text())
    return found


def journal(training: Training) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (training.output_dir / "metrics.jsonl").read_text().splitlines()]


def synced(training: Training, server: WandbServer) -> None:
    """What the user is told, typed in."""
    (line,) = [line for line in training.report if line.startswith("offline; ")]
    training.server = server
    training.variables = {name: value for name, value in training.variables.items() if name != "WANDB_MODE"}
    done = training.type_in(line.partition("`")[2].rstrip("`"))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def whole(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, RunRecord]:
    """The training that nothing happened to."""
    training = begun(tmp_path_factory.mktemp("whole") / "run", server).ended()
    run = server.run(identity(training)["run_id"])
    assert len(run.rows) == ROWS
    return training, run


def assert_one_run(training: Training, server: WandbServer, whole: tuple[Training, RunRecord]) -> None:
    run = server.run(identity(training)["run_id"])
    assert rows(run) == rows(whole[1])
    assert _untimed(run.summary) == _untimed(whole[1].summary)
    assert [line["_row"] for line in journal(training)] == list(range(ROWS))
    names = ("model.safetensors", "model.safetensors")
    assert (
        len({(each.output_dir / name).read_bytes() for each, name in zip((training, whole[0]), names, strict=True)})
        == 1
    )


@pytest.mark.parametrize("what", ["all", "script", "core"])
def test_killed_before_and_after_a_checkpoint_the_history_is_that_of_a_run_that_was_not(
    what: str, server: WandbServer, whole: tuple[Training, RunRecord], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for step in (4, 14, 8):  # of each attempt: before the first checkpoint, behind it, behind the second
        training = begun(folder, server)
        training.reach(step)
        kill(training, what)
        if what == "core":
            training.reach(len(training.began_steps) + 2)
            kill(training, "all")
    training = begun(folder, server).ended()
    assert training.report[-1] == f"{ROWS} rows, all confirmed by the server"
    assert_one_run(training, server, whole)
    assert identity(training)["exit_code"] == 0


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_another_process_of_wandbs_takes_over_from_one_that_was_killed(
    mode: str, server: WandbServer, whole: tuple[Training, RunRecord], tmp_path: Path
) -> None:
    is_online = mode == "online"
    more = {"wandb_log_model": "checkpoint"} if is_online else {"variables": {"WANDB_MODE": "offline"}}
    training = begun(tmp_path / "run", server if is_online else None, **more)
    training.reach(14)
    kill(training, "core")
    training.reach(29)  # and shortly before the end
    kill(training, "core")
    training.ended()
    assert training.err.count("wandb's process has died: another one takes over") == 2
    assert "Traceback" not in training.err
    if is_online:
        assert training.report[-2] == f"{ROWS} rows, all confirmed by the server"
        logged = [found for found in server.artifacts() if found.logged_by == identity(training)["run_id"]]
        steps = {alias for found in logged for alias in found.aliases if alias.startswith("checkpoint_global")}
        assert steps == {f"checkpoint_global_step_{step}" for step in (10, 20, 30)}
    else:
        synced(training, server)
    assert_one_run(training, server, whole)


@pytest.mark.parametrize("torn_bytes", [0, 700])
def test_offline_one_sync_of_all_attempts_gives_the_same_history(
    torn_bytes: int, server: WandbServer, whole: tuple[Training, RunRecord], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    offline = {"variables": {"WANDB_MODE": "offline"}}
    killed = begun(folder, None, **offline)
    killed.reach(14)
    kill(killed, "all")
    preempted = begun(folder, None, **offline)
    preempted.reach(5)
    preempted.process.terminate()
    preempted.ended(85)
    (path,) = (preempted.output_dir / "wandb").glob("offline-run-*/*.wandb")
    with path.open("r+b") as file:  # as a loss of power may leave it
        file.truncate(path.stat().st_size - torn_bytes)
    killed = begun(folder, None, **offline)
    killed.reach(8)
    kill(killed, "script")
    # Without a word on it the run stays what it is, though there is a server.
    training = begun(folder, server).ended()
    # wandb's process writes after up to 15 s: a short attempt that was killed has left nothing but its folder.
    torn, left = (len(list((training.output_dir / "wandb").glob(f"{name}-*"))) for name in ("torn", "offline-run"))
    assert torn + left == 4
    assert left >= 2
    synced(training, server)
    assert_one_run(training, server, whole)


def test_an_offline_run_goes_on_online_when_it_is_told_to(
    server: WandbServer, whole: tuple[Training, RunRecord], tmp_path: Path
) -> None:
    training = begun(tmp_path / "run", None, variables={"WANDB_MODE": "offline"})
    training.reach(14)
    training.process.terminate()
    training.ended(85)
    training = begun(tmp_path / "run", server, wandb_mode="online").ended()
    assert_one_run(training, server, whole)
    assert list((training.output_dir / "wandb").glob("offline-run-*/*.synced"))


def test_an_online_run_whose_server_is_gone_keeps_its_rows_and_a_command_delivers_them(
    server: WandbServer, whole: tuple[Training, RunRecord], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    training = begun(folder, server)
    training.reach(14)
    kill(training, "all")
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    training = begun(folder, server, variables=away)
    training.reach(5)
    training.process.kill()
    training.process.wait()
    training = begun(folder, server, variables=away).ended()
    assert "the run is online and stays so; its rows wait on this disk" in training.err
    (line,) = training.report
    assert line.startswith(f"{ROWS} rows are in {training.output_dir}/metrics.jsonl; deliver them: harness sync ")
    assert len(journal(training)) == ROWS
    training.variables.pop("WANDB_BASE_URL")
    done = training.type_in(line.partition(": ")[2])
    assert done.returncode == 0, done.stderr
    run = server.run(identity(training)["run_id"])
    wanted = [{name: value for name, value in row.items() if name != "_runtime"} for row in rows(whole[1])]
    assert [{name: value for name, value in row.items() if name != "_runtime"} for row in rows(run)] == wanted
    assert run.state == "finished"
    assert f"finished, {ROWS} rows in W&B" in training.type_in(line.partition(": ")[2]).stdout


def test_a_fork_is_a_run_of_its_own_beside_the_old(server: WandbServer, tmp_path: Path) -> None:
    old = begun(tmp_path / "run", server).ended()
    old_id = identity(old)["run_id"]
    before = rows(server.run(old_id))
    out = tmp_path / "fork" / "out"
    arguments = {"resume_from_checkpoint": old.output_dir / "checkpoint-20", "output_dir": out}
    arguments["task"] = {"times": str(old.times)}
    fork = begun(tmp_path / "fork", server, wandb_fork="true", **arguments).ended()
    found = json.loads((out / "wandb_run.json").read_text())
    run = server.run(found["run_id"])
    assert (run.group, run.config["forked_from"]) == (old_id, old_id)
    assert rows(server.run(old_id)) == before
    assert next(row["train/global_step"] for row in run.rows) == 21
    assert fork.report[-1] == f"{len(run.rows)} rows, all confirmed by the server"


def test_other_numbers_are_not_written_behind_those_that_are_there(server: WandbServer, tmp_path: Path) -> None:
    training = begun(tmp_path / "run", server)
    training.reach(15)
    kill(training, "script")
    other = {"learning_rate": 5e-3, "allow_changed_arguments": "true"}
    refused = begun(tmp_path / "run", server, **other).ended(2)
    assert "rows beyond the checkpoint, made as before: give --wandb_fork" in refused.err
    assert "Traceback" not in refused.err
    fork = begun(tmp_path / "run", server, wandb_fork="true", **other).ended()
    assert len({line["_row"] for line in journal(fork)}) == ROWS
    assert len(list(fork.output_dir.glob("metrics.*.jsonl"))) == 1
    assert identity(fork)["forked_from"] != identity(fork)["run_id"]


def test_a_run_goes_on_where_its_folder_was_moved_and_its_offline_files_were_synced_and_deleted(
    server: WandbServer, whole: tuple[Training, RunRecord], tmp_path: Path
) -> None:
    more: dict[str, Any] = {"variables": {"WANDB_MODE": "offline"}, "task": {"times": str(tmp_path / "times")}}
    training = begun(tmp_path / "a" / "run", None, max_steps=20, **more).ended()
    synced(training, server)
    for folder in (training.output_dir / "wandb").glob("offline-run-*"):
        shutil.rmtree(folder)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "run").rename(tmp_path / "b" / "run")
    training = begun(tmp_path / "b" / "run", None, max_steps=30, **more).ended()
    synced(training, server)
    run = server.run(identity(training)["run_id"])
    steps = [row["train/global_step"] for row in run.rows if "train/loss" in row]
    assert steps == list(range(1, 31))
