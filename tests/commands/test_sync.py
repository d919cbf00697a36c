"""`harness sync`: runs of all kinds arrive whole, each row once, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from wandb.proto import wandb_internal_pb2

from harness.__main__ import main
from harness.checkpoint import lock as locks
from harness.checkpoint.lock import Heartbeats, Lock
from harness.commands.watch import find_runs, state_of
from harness.tracking.rows.wandb_file import encode, read_records
from harness.tracking.run import identity as identities
from harness.tracking.run.identity import Identity
from harness.tracking.sync import Sent
from tests.support.faulty_training import Training, committed, environment
from tests.support.wandb.artifact_processes import command
from tests.support.wandb.file import records_of, written
from tests.support.wandb.seen import _untimed
from tests.support.wandb_server import WandbServer

NOBODY = "http://127.0.0.1:9"
ROWS = 30 + 6 + 1  # a log a step, six evaluations, the end
ARGUMENTS: dict[str, Any] = {
    "wandb_run_id": None,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "resume_from_checkpoint": "auto",
}


def begun(folder: Path) -> Training:
    (folder / "times").unlink(missing_ok=True)
    return Training(folder, None, pace=0.1, variables={"WANDB_MODE": "offline"}, **ARGUMENTS)


def identity(training: Training) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((training.output_dir / "wandb_run.json").read_text())
    return found


class Sync:
    """The command, in a process that can be killed and started again; all starts of it write to one file."""

    def __init__(self, folder: Path, server: WandbServer, *arguments: str, **variables: str) -> None:
        folder.mkdir(exist_ok=True)
        self.out = folder / "out"
        # A login shell may hold what is meant for the trainings.
        variables = environment(folder, server, WANDB_MODE="offline", **variables)
        with self.out.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness", "sync", *arguments],
                env=variables,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def wait_for(self, condition: Any, what: str) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.out.read_text()
            assert time.monotonic() < end, f"{what}\n{self.out.read_text()}"
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def uploads_of(server: WandbServer) -> int:
    """How often a run was opened by `wandb sync`."""
    return sum(each["label"] == "graphql UpsertBucket" for each in server.requests())


@pytest.mark.slow
def test_three_live_runs_arrive_whole_though_one_and_the_sync_itself_are_killed(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with WandbServer(tmp_path / "server") as server:
        trainings = [begun(runs / name) for name in ("a", "b", "c")]
        away = Sync(tmp_path / "away", server, str(offline_run(tmp_path / "other")), "--once", WANDB_BASE_URL=NOBODY)
        syncs = (tmp_path / "sync", server, str(runs), "--until-finished", "--interval", "1")
        sync = Sync(*syncs)
        for training in trainings:  # held until rows have come: wandb's process writes to its file every 15 s only
            training.reach(14)
            training.process.send_signal(signal.SIGSTOP)
        # Killed while `wandb sync` is at work, which outlives it; and while rows are sent.
        sync.wait_for(lambda: uploads_of(server) > 0, "no run was begun")
        sync.kill()
        sync = Sync(*syncs)
        killed = identity(trainings[0])["run_id"]
        sync.wait_for(lambda: any(run.id == killed and run.rows for run in server.runs()), "no rows came of a live run")
        sync.kill()
        assert away.process.wait(60) == 2
        assert away.out.read_text() == f"harness sync: W&B can't be reached at {NOBODY}. Nothing was sent.\n"
        live = server.run(killed)
        assert 0 < len(live.rows) < ROWS
        assert live.state == "running"
        trainings[0].process.kill()
        trainings[0].process.wait()
        sync = Sync(*syncs)
        trainings[0] = begun(runs / "a")
        for training in trainings[1:]:
            training.process.send_signal(signal.SIGCONT)
        for training in trainings:
            training.ended()
        assert sync.process.wait(120) == 0, sync.out.read_text()
        said = sync.out.read_text()
        assert said.splitlines()[-1].endswith("All 3 runs are finished, and W&B has all of them.")
        assert server.unknown() == []
        seen = [server.run(identity(training)["run_id"]) for training in trainings]
        for training, run in zip(trainings, seen, strict=True):
            lines = [json.loads(line) for line in (training.output_dir / "metrics.jsonl").read_text().splitlines()]
            assert [row["_step"] for row in run.rows] == list(range(ROWS))
            kept = [{name: value for name, value in line.items() if name != "_row"} for line in lines]
            assert [{**row, "_runtime": 0} for row in run.rows] == [{**line, "_runtime": 0} for line in kept]
            assert (run.state, run.exit_code) == ("finished", 0)
            assert run.raw_config["_wandb"]["value"]["m"] == seen[0].raw_config["_wandb"]["value"]["m"] != []
            assert {"requirements.txt", "wandb-metadata.json", "output.log"} <= set(run.files)
            assert _untimed(run.summary) == _untimed(seen[1].summary)
            logged = [found for found in committed(server) if found.logged_by == run.id]
            steps = {alias for found in logged for alias in found.aliases if alias.startswith("checkpoint_global")}
            assert steps == {f"checkpoint_global_step_{step}" for step in (10, 20, 30)}
            assert {"base_model", "final_model"} <= {alias for found in logged for alias in found.aliases}
            (latest,) = [each for each in logged if "checkpoint" in each.collection and "latest" in each.aliases]
            assert "checkpoint_global_step_30" in latest.aliases
            weights = latest.contents["model.safetensors"].read_bytes()
            assert weights == (training.output_dir / "model.safetensors").read_bytes()
            assert not (training.output_dir / "wandb-artifacts").exists()
        assert [_untimed(row) for row in seen[0].rows] == [_untimed(row) for row in seen[1].rows]
        assert seen[0].summary["train/global_step"] == 30
        # Again: nothing is sent.
        rows = sum("file_stream" in each["label"] for each in server.requests())
        again = Sync(tmp_path / "sync", server, str(runs), "--once")
        assert again.process.wait(60) == 0, again.out.read_text()
        assert sum("file_stream" in each["label"] for each in server.requests()) == rows


def sent(server: WandbServer) -> int:
    """How often rows, states or artifacts were sent."""
    labels = [each["label"] for each in server.requests()]
    return sum("file_stream" in label or "CommitArtifact" in label or "UpsertBucket" in label for label in labels)


@pytest.mark.slow
def test_one_command_brings_runs_of_all_kinds_whatever_they_are(tmp_path: Path) -> None:
    """Finished offline, still going offline, and online with rows and artifacts that W&B had refused."""
    runs = tmp_path / "runs"
    with WandbServer(tmp_path / "server") as server:
        finished = Training(runs / "finished", None, variables={"WANDB_MODE": "offline"}, **ARGUMENTS)
        online = Training(runs / "online", server, pace=0.1, **ARGUMENTS)
        online.reach(12)
        server.fault("status", "file_stream", code=403)
        server.fault("status", "graphql CommitArtifact", code=400)
        finished.ended()
        online.ended()
        server.clear_faults()
        (partly,) = server.runs()
        assert len(partly.rows) < ROWS
        assert f"harness sync {online.output_dir}" in " ".join(online.report)
        assert finished.report[0] == "offline; upload it with `harness sync out`"  # from where it was typed
        live = Training(runs / "live", None, pace=0.2, variables={"WANDB_MODE": "offline"}, **ARGUMENTS)
        live.reach(3)
        live.process.send_signal(signal.SIGSTOP)  # it runs for as long as the command needs to begin
        sync = Sync(tmp_path / "sync", server, str(runs), "--interval", "1")
        sync.wait_for(lambda: f"{live.output_dir}: running" in sync.out.read_text(), "the live run is not seen")
        live.process.send_signal(signal.SIGCONT)
        live.ended()
        assert sync.process.wait(120) == 0, sync.out.read_text()
        said = sync.out.read_text()
        for training in (finished, online, live):
            run = server.run(identity(training)["run_id"])
            assert f"{training.output_dir}: finished, {ROWS} rows in W&B" in said
            assert [row["_step"] for row in run.rows] == list(range(ROWS))
            assert (run.state, run.exit_code) == ("finished", 0)
            aliases = {alias for found in committed(server) if found.logged_by == run.id for alias in found.aliases}
            assert {"final_model", *(f"checkpoint_global_step_{step}" for step in (10, 20, 30))} <= aliases
            assert not (training.output_dir / "wandb-artifacts").exists()
        assert server.unknown() == []
        before = sent(server)
        for folder in (runs, next(finished.output_dir.glob("wandb/offline-run-*")), online.output_dir / "wandb"):
            again = Sync(tmp_path / "sync", server, str(folder))
            assert again.process.wait(60) == 0, again.out.read_text()
        assert sent(server) == before


OWN_LOOP = """
from pathlib import Path
import wandb
from harness.__main__ import main

for name in ("a", "b"):
    run = wandb.init(project="p", id=name, mode="offline", dir=".")
    for number in range(3):
        run.log({"number": number})
    run.finish()
(first,) = Path("wandb").glob("offline-run-*-a")
assert main(["sync", str(first)]) == 0
"""


@pytest.mark.slow
def test_offline_runs_of_a_loop_of_ones_own_are_brought_too(tmp_path: Path) -> None:
    with WandbServer(tmp_path / "server") as server:
        given: dict[str, Any] = {"env": environment(tmp_path, server), "cwd": tmp_path, "text": True, "check": False}
        done = subprocess.run([sys.executable, "-c", OWN_LOOP], capture_output=True, **given)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [run.id for run in server.runs()] == ["a"], "one of W&B's folders is one run"
        done = subprocess.run([sys.executable, "-m", "harness", "sync", "."], capture_output=True, **given)
        assert done.returncode == 0, done.stdout + done.stderr
        for name in ("a", "b"):
            run = server.run(name)
            assert [row["number"] for row in run.rows] == [0, 1, 2]
            assert (run.state, run.exit_code) == ("finished", 0)
        assert server.unknown() == []


ATTEMPTS = """
import json, shutil, subprocess, sys
from pathlib import Path
import wandb
from harness.__main__ import main
from harness.tracking.run import identity as identities
from harness.tracking.run.identity import Identity

output_dir = Path("run")
(output_dir / "wandb").mkdir(parents=True)
number = 0

def attempt(rows, **kwargs):
    global number
    run = wandb.init(project="p", id="abc", mode="offline", dir=output_dir, **kwargs)
    for _ in range(rows - 1):
        run.log({"number": number})
        number += 1
    run.log({"number": number, "table": wandb.Table(columns=["of"], data=[[number]])})
    number += 1
    run.finish()
    identities.write(output_dir, Identity(run_id="abc", project="p", mode="offline", exit_code=0))
    (folder,) = set((output_dir / "wandb").glob("offline-run-*")) - set(seen)
    seen.append(folder)
    return folder

seen = []
first = attempt(4)
subprocess.run([sys.executable, "-m", "wandb", "sync", first], check=True)
second = attempt(3, resume="allow", config={"attempts": 2})
assert main(["sync", "run", "--once"]) == 0
for folder in (first, second):
    assert (folder / "run-abc.wandb.synced").exists()
    shutil.rmtree(folder)
attempt(2, resume="allow", config={"attempts": 3})
assert main(["sync", "run", "--once"]) == 0
"""


@pytest.mark.slow
def test_what_wandb_sync_has_brought_before_and_what_was_deleted_since_does_not_come_again(tmp_path: Path) -> None:
    with WandbServer(tmp_path / "server") as server:
        variables = environment(tmp_path, server)
        done = subprocess.run(
            [sys.executable, "-c", ATTEMPTS], env=variables, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (run,) = server.runs()
        assert [row["number"] for row in run.rows] == list(range(4 + 3 + 2))
        assert [row["_step"] for row in run.rows] == list(range(4 + 3 + 2))
        tables = [row["table"]["path"] for row in run.rows if "table" in row]
        assert len(tables) == 3
        assert set(tables) <= set(run.files)
        assert (run.state, run.config["attempts"], run.summary["number"]) == ("finished", 3, 8)
        assert server.unknown() == []


def record(**fields: Any) -> Any:
    found = wandb_internal_pb2.Record()
    for name, value in fields.items():
        getattr(found, name).MergeFrom(value)
    return found


def short_run(output_dir: Path) -> None:
    """An offline run of three rows that has printed a line and ended with exit code 3."""
    run, *rest = records_of("abc", start=5, rows=3)
    printed = record(output_raw=wandb_internal_pb2.OutputRawRecord(line="printed\n"))
    written(output_dir / "wandb" / "offline-run-20260101_000000-abc" / "run-abc.wandb", [run, printed, *rest])
    identities.write(output_dir, Identity(run_id="abc", project="p", mode="offline", exit_code=3))


@pytest.mark.slow
def test_what_wandb_sync_loses_without_a_word_is_sent_again_or_said(tmp_path: Path) -> None:
    short_run(tmp_path / "run")
    arguments = (str(tmp_path / "run"), "--once")
    with WandbServer(tmp_path / "server") as server:
        server.fault("lose", "file_stream")
        sync = Sync(tmp_path / "sync", server, *arguments)
        assert sync.process.wait(120) == 1
        assert "not brought: `wandb sync` said nothing, but W&B lacks the end of offline-run-" in sync.out.read_text()
        server.clear_faults()
        server.fault("lose", "file_stream", count=2)
        sync = Sync(tmp_path / "sync", server, *arguments)
        assert sync.process.wait(120) == 0, sync.out.read_text()
        (run,) = server.runs()
    assert run.output == ["printed"]
    assert [row["_step"] for row in run.rows] == [0, 1, 2]
    assert (run.state, run.exit_code, run.summary["nested"]) == ("failed", 3, {"step": 2})


@pytest.mark.slow
def test_rows_that_the_users_own_wandb_sync_has_lost_are_brought(tmp_path: Path) -> None:
    short_run(tmp_path / "run")
    with WandbServer(tmp_path / "server") as server:
        server.fault("lose", "file_stream")
        (folder,) = (tmp_path / "run" / "wandb").iterdir()
        assert command(f"wandb sync {folder}", tmp_path, server).returncode == 0
        assert (folder / "run-abc.wandb.synced").exists()
        assert server.run("abc").rows == []
        server.clear_faults()
        sync = Sync(tmp_path / "sync", server, str(tmp_path / "run"), "--once")
        assert sync.process.wait(120) == 0, sync.out.read_text()
        run = server.run("abc")
    assert [row["_step"] for row in run.rows] == [0, 1, 2]
    assert (run.state, run.exit_code, run.summary["nested"]) == ("failed", 3, {"step": 2})


def test_what_is_sent_is_a_whole_file_whatever_the_sizes_of_its_records() -> None:
    sizes = (0, 1, 32_754, 32_753, 32_760, 7, 100_000, 32_768, 5)
    records = [record(output_raw=wandb_internal_pb2.OutputRawRecord(line="x" * size)) for size in sizes]
    data = b":W&B\x00\x00\x00" + encode(each.SerializeToString() for each in records)
    read = list(read_records(data))
    assert [len(each.output_raw.line) for each, _ in read] == list(sizes)
    assert read[-1][1] == len(data)


def test_what_the_version_before_has_sent_is_known(tmp_path: Path) -> None:
    noted = {"run_id": "abc", "first_row": 2, "lives": {"offline-run-20260101_000000-abc": [5, 0, 3]}}
    (tmp_path / "wandb_sync.json").write_text(json.dumps(noted))
    sent = Sent.read(tmp_path, "abc")
    assert sent.folders == noted["lives"]
    sent.write(tmp_path)
    assert json.loads((tmp_path / "wandb_sync.json").read_text()) == noted


def offline_run(output_dir: Path, *, exit_code: int | None = 0, mode: str = "offline") -> Path:
    """A folder as a training leaves it, with a file that says whose it is and no more."""
    folder = output_dir / "wandb" / "offline-run-20260101_000000-abc"
    folder.mkdir(parents=True)
    run = wandb_internal_pb2.RunRecord(run_id="abc", project="p")
    (folder / "run-abc.wandb").write_bytes(b":W&B\x00\x00\x00" + encode([record(run=run).SerializeToString()]))
    identities.write(output_dir, Identity(run_id="abc", project="p", mode=mode, exit_code=exit_code))
    return output_dir


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder."),
        (["empty", "--once"], "empty: no run with W&B is here or in a folder below"),
        (["empty"], "give --until-finished to wait for one"),
        (["online"], "No W&B credentials found: run `wandb login`, or set WANDB_API_KEY. Nothing was sent."),
        (["offline", "--interval", "0"], "--interval=0: give seconds, more than 0."),
        (["offline", "--once"], "No W&B credentials found: run `wandb login`, or set WANDB_API_KEY. Nothing was sent."),
    ],
)
def test_what_can_not_work_is_said(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    offline_run(tmp_path / "offline")
    offline_run(tmp_path / "online", mode="online")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["sync", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("exit_code", "has_marker", "is_held", "state"),
    [
        (0, False, False, "finished"),
        (1, False, False, "finished"),
        (85, False, False, "preempted"),  # its marker has been taken away by the next attempt's script
        (None, True, False, "preempted"),
        (None, False, True, "running"),
        (0, False, True, "running"),  # an attempt that has not opened the run yet
    ],
)
def test_how_a_run_is(exit_code: int | None, has_marker: bool, is_held: bool, state: str, tmp_path: Path) -> None:
    output_dir = offline_run(tmp_path / "run", exit_code=exit_code)
    if has_marker:
        (output_dir / "preempted").touch()
        wandb_file = next(output_dir.glob("wandb/*/*.wandb"))
        os.utime(wandb_file, (0, 0))
    (run,) = find_runs([output_dir])
    with Lock() as lock:
        if is_held:
            owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            lock.take(output_dir)
            holder = json.loads((output_dir / "harness.lock").read_text())
            process = psutil.Process(owner.pid)
            holder |= {"pid": owner.pid, "created_at": process.create_time()}
            (output_dir / "harness.lock").write_text(json.dumps(holder))
        try:
            assert state_of(run, Heartbeats()) == state
        finally:
            if is_held:
                owner.kill()
                owner.communicate()


def test_a_run_that_can_not_be_seen_goes_on_until_its_heartbeat_has_been_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir = offline_run(tmp_path / "run", exit_code=None)
    (run,) = find_runs([output_dir])
    with Lock() as lock:
        lock.take(output_dir)
        holder = json.loads((output_dir / "harness.lock").read_text())
    holder |= {"created_at": "another-boot pid:[1] 1"}
    (output_dir / "harness.lock").write_text(json.dumps(holder))
    os.utime(output_dir / "harness.lock", (0, 0))  # by another machine's clock
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.5)
    heartbeats = Heartbeats()
    assert state_of(run, heartbeats) == "running"
    time.sleep(0.6)
    assert state_of(run, heartbeats) == "interrupted"
    os.utime(output_dir / "harness.lock", (1, 1))
    assert state_of(run, heartbeats) == "running"
