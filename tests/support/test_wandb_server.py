"""The real wandb client against the loopback server, each client in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.tracking.client import server_answers
from tests.support.wandb_server import ENTITY, WandbServer

ROOT = Path(__file__).parents[2]

# Retries come after a second; the client takes whole ones only.
HEADER = """
import json, os, pathlib, sys, time
import wandb

def start(**options):
    soon = {f"x_{kind}_retry_wait_{end}_seconds": 1 for kind in ("file_stream", "file_transfer", "graphql")
            for end in ("min", "max")}
    settings = wandb.Settings(x_disable_stats=True, x_file_stream_transmit_interval=1, **soon)
    return wandb.init(project="p", settings=settings, **options)

def artifact(name, **files):
    made = wandb.Artifact(name, "model", metadata={"of": name})
    for file, text in files.items():
        path = pathlib.Path("made") / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        made.add_file(str(path), name=file.replace("__", "/"))
    return made
"""

ONE_RUN = """
words = {"name": "a run", "group": "g", "job_type": "train", "notes": "n", "tags": ["t"]}
run = start(id="one", config={"lr": 0.1, "m": {"k": 1}}, **words)
for i in range(5):
    run.log({"i": i, "nan": float("nan")})
run.summary["best"] = 3
print("said in the run")
pathlib.Path("saved.txt").write_text("kept")
run.save("saved.txt", policy="now")
run.alert("look", "here")
run.finish()
seen = wandb.Api().run("p/one")
print(json.dumps({
    "config": seen.config, "best": seen.summary["best"], "state": seen.state, "last": seen.lastHistoryStep,
    "scanned": [row["i"] for row in seen.scan_history(page_size=2, min_step=1)],
    "part": [row["i"] for row in seen.scan_history(["i", "nan"], min_step=3)],
    "history": [row["i"] for row in seen.history(pandas=False)], "files": [file.name for file in seen.files()],
    "file": seen.file("saved.txt").download("downloaded").read(), "tags": seen.tags,
    "found": [run.id for run in wandb.Api().runs("p", {"$and": [{"display_name": "a run"}, {"state": "finished"}]})],
}))
"""

RESUMES = """
def again(run_id, resume):
    try:
        run = start(id=run_id, resume=resume, config={resume: 1})
    except wandb.errors.UsageError:
        return "refused"
    told = [run.resumed, run.starting_step]
    run.log({"x": 1})
    run.log({"x": 2})
    run.finish()
    return told

calls = [("none", "must"), ("r", "never"), ("r", "must"), ("r", "allow"), ("new", "allow"), ("r", "never")]
print(json.dumps([again(*call) for call in calls]))
"""

ENDS = """
start(id="good").finish()
start(id="bad").finish(exit_code=3)
run = start(id="preempted")
run.mark_preempting()
run.finish(exit_code=1)
run = start(id="silent")
run.log({"x": 1})
time.sleep(0.2)
os._exit(1)
"""

ROUND_TRIP = """
run = start(id="logs")
first = run.log_artifact(artifact("model", a="one", sub__b="two"), aliases=["best"])
first.wait()
same = run.log_artifact(artifact("model", a="one", sub__b="two")).wait()
second = run.log_artifact(artifact("model", a="changed", sub__b="two"), aliases=["best"])
second.wait()
linked = run.link_artifact(second, "wandb-registry-model/shipped", aliases=["prod"])
second.link(f"{run.entity}/p/plain")
told = {"versions": [first.version, same.version, second.version], "linked": linked.qualified_name}
try:
    second.link("wandb-registry-none/x")
except Exception as error:
    told["unlinkable"] = str(error)
run.finish()
run = start(id="uses")
used = run.use_artifact("model:best")
told["used"] = used.version
folder = used.download("whole")
used.verify(folder)
files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
told["whole"] = {str(path.relative_to(folder)): path.read_text() for path in files}
told["part"] = pathlib.Path(run.use_artifact("model:v0").get_entry("sub/b").download("part")).read_text()
run.finish()
"""

AFTERWARDS = """
api = wandb.Api()
change = api.artifact("p/model:v1")
change.aliases.append("kept")
change.aliases.remove("best")
change.metadata["more"] = [1]
change.save()
told["versions_now"] = [[each.version, each.aliases] for each in api.artifacts("model", "p/model")]
told["by_registry"] = api.artifact("wandb-registry-model/shipped:prod").source_version
told["logged"] = [each.name for each in api.run("p/logs").logged_artifacts()]
told["used_by"] = [each.id for each in change.used_by()]
api.artifact("p/plain:latest").unlink()
old = api.artifact("p/model:v0")
old.aliases.append("guarded")
old.save()
try:
    old.delete()
except wandb.errors.CommError as error:
    told["undeleted"] = str(error)
old.delete(delete_aliases=True)
told["exists"] = [api.artifact_exists(f"p/model:v{i}") for i in (0, 1)]
print(json.dumps(told))
"""

ROWS = """
run = start(id="rows", resume="allow")
for i in range(int(sys.argv[1])):
    run.log({"i": i})
    time.sleep(0.05)
for name in sys.argv[2:]:
    logged = run.log_artifact(artifact("model", **{name: name * 300000}))
    try:
        logged.wait()
        folder = wandb.Api().artifact("p/model:latest").download(f"fetched-{name}", skip_cache=True)
        logged.verify(folder)
        print(name, "VERIFIED")
    except Exception as error:
        print(name, "FAILED", error)
run.finish()
"""

# What `wandb sweep` and `wandb agent` ask. Its runs are opened as ours are without an agent.
SWEPT = """
from wandb.apis.public import sweeps
config = {"method": "grid", "program": "train.py", "parameters": {"a": {"values": [1, 2]}, "b": {"value": "x"}}}
found, _ = sweeps._upsert_sweep(wandb.Api(), config, project="p", entity="tester")
api = wandb.Api()  # this one has the project that the first was told
agent = sweeps._register_agent(api, "here", sweep_id=found["name"])["id"]

def beat(*runs):
    answer = sweeps._agent_heartbeat(api, agent, {}, {run: True for run in runs})
    return [(each["type"], each.get("run_id"), {k: v["value"] for k, v in each.get("args", {}).items()})
            for each in answer]

def state():
    return sweeps._get_sweep_state(api, found["name"])

told = {"before": state()}
(kind, one, args), = beat()
told["first"] = [kind, args, beat(one)]
run = start(id=one, config=args)
run.mark_preempting()
run.finish(exit_code=85)
(kind, again, args), = beat()
told["again"] = [kind, again == one, "_wandb" in args, args["a"]]
start(id=one, resume="allow").finish()
(kind, two, args), = beat()
told["second"] = [kind, args]
sweeps._set_sweep_state(api, found["name"], "CANCELED")
told["cancelled"] = [beat(two), beat(), state()]
told["runs"] = [[each["name"] == one, each["state"]] for each in
                sweeps._sweep_with_runs(api, found["name"], "{}")["runs"]]
print(json.dumps(told))
"""

# It asks every 15 s whether to stop, and hears of that with what it sends, every 15 s too.
STOPPED = """
run = wandb.init(project="p", id="stopped")
try:
    for i in range(600):
        run.log({"i": i})
        time.sleep(0.1)
except KeyboardInterrupt:
    run.finish(exit_code=1)
    print("STOPPED")
"""


def environment(folder: Path, server: WandbServer | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    places = {f"WANDB_{kind}_DIR": str(folder / "wandb-dirs" / kind) for kind in ("CONFIG", "CACHE", "DATA")}
    home = {"HOME": str(folder / "home"), "NETRC": str(folder / "netrc"), "WANDB_SILENT": "true"}
    return {**kept, **places, **home, **(server.environment() if server else {"WANDB_MODE": "offline"})}


def begin(script: str, *argv: str, folder: Path, server: WandbServer | None) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", HEADER + script, *argv],
        env=environment(folder, server),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What the script has printed."""
    try:
        out, err = process.communicate(timeout=90)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == code, err
    return out


def run(script: str, *argv: str, folder: Path, server: WandbServer | None, code: int = 0) -> str:
    return finish(begin(script, *argv, folder=folder, server=server), code)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WandbServer]:
    """At the end of the test there must be no request that the server did not know."""
    with WandbServer(tmp_path / "server") as running:
        yield running
        assert running.unknown() == []


def test_an_online_run_arrives_whole_and_is_seen_by_the_public_api(server: WandbServer, tmp_path: Path) -> None:
    told = json.loads(run(ONE_RUN, folder=tmp_path / "run", server=server).splitlines()[-1])
    (kept,) = server.runs()
    assert [(row["_step"], row["i"], row["nan"]) for row in kept.rows] == [(i, i, "NaN") for i in range(5)]
    assert (kept.id, kept.name, kept.project, kept.entity) == ("one", "a run", "p", ENTITY)
    assert (kept.group, kept.job_type, kept.notes, kept.tags) == ("g", "train", "n", ["t"])
    assert (kept.config, kept.summary["i"], kept.summary["best"]) == ({"lr": 0.1, "m": {"k": 1}}, 4, 3)
    assert (kept.state, kept.exit_code, kept.preempting) == ("finished", 0, False)
    assert kept.output[0] == "said in the run"
    assert kept.files["saved.txt"].read_text() == "kept"
    assert kept.alerts == [{"title": "look", "text": "here", "severity": "INFO"}]
    assert told.pop("files") == sorted(kept.files)
    assert [told.pop(name) for name in ("scanned", "history", "part")] == [[1, 2, 3, 4], [0, 1, 2, 3, 4], [3, 4]]
    assert (told.pop("config"), told.pop("tags"), told.pop("found")) == (kept.config, ["t"], ["one"])
    assert told == {"best": 3, "state": "finished", "last": 4, "file": "kept"}


def test_resume_must_allow_and_never_mean_what_they_mean_at_wandb(server: WandbServer, tmp_path: Path) -> None:
    told = json.loads(run(RESUMES, folder=tmp_path / "run", server=server).splitlines()[-1])
    assert told == ["refused", [False, 0], [True, 2], [True, 4], [False, 0], "refused"]
    resumed = server.run("r")
    assert [(row["_step"], row["x"]) for row in resumed.rows] == [(0, 1), (1, 2), (2, 1), (3, 2), (4, 1), (5, 2)]
    assert resumed.config == {"never": 1, "must": 1, "allow": 1}


@pytest.mark.slow
def test_the_state_of_a_run_tells_how_it_ended(tmp_path: Path) -> None:
    with WandbServer(tmp_path / "server", silence_seconds=0.5) as server:
        run(ENDS, folder=tmp_path / "run", server=server, code=1)
        time.sleep(0.6)
        ends = {each.id: (each.state, each.exit_code) for each in server.runs()}
    assert (ends.pop("good"), ends.pop("bad")) == (("finished", 0), ("failed", 3))
    assert ends == {"preempted": ("preempted", 1), "silent": ("crashed", None)}


def test_artifacts_make_the_round_trip(server: WandbServer, tmp_path: Path) -> None:
    told = json.loads(run(ROUND_TRIP + AFTERWARDS, folder=tmp_path / "run", server=server).splitlines()[-1])
    assert told["versions"] == ["v0", "v0", "v1"]
    assert told["linked"] == "test-org/wandb-registry-model/shipped:v0"
    assert "registry wandb-registry-none not found" in told["unlinkable"]
    assert (told["used"], told["whole"]) == ("v1", {"a": "changed", "sub/b": "two"})
    assert told["part"] == "two"
    assert told["versions_now"] == [["v1", ["latest", "kept"]], ["v0", []]]
    assert (told["by_registry"], told["used_by"], told["logged"]) == ("v1", ["uses"], ["model:v0", "model:v1"])
    assert "guarded" in told["undeleted"]
    assert told["exists"] == [False, True]
    first, second = server.artifacts("model")
    assert (first.state, second.state) == ("DELETED", "COMMITTED")
    assert (second.version, second.aliases, second.metadata) == ("v1", ["latest", "kept"], {"of": "model", "more": [1]})
    assert (second.type, second.logged_by, second.used_by) == ("model", "logs", ["uses"])
    assert second.files["a"][0] == len("changed")
    assert second.contents["a"].read_text() == "changed"
    (link,) = server.links()
    assert (link.target, link.source) == ("test-org/wandb-registry-model/shipped", second.name)
    assert (link.version, set(link.aliases)) == ("v0", {"latest", "prod"})
    # Contents that the project has already are not sent again.
    assert [each["label"] for each in server.requests()].count("put artifact/sub/b") == 1


def test_wandb_sync_delivers_an_offline_run(server: WandbServer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # More rows than wandb-core 0.31 may lose without a word, see `sync_without_rows`.
    script = 'run = start(id="off", config={"c": 1})\nfor i in range(40): run.log({"i": i})\n'
    run(f'{script}run.log_artifact(artifact("model", a="offline"))\nrun.finish()', folder=folder, server=None)
    command = [sys.executable, "-m", "wandb", "sync", *map(str, folder.glob("wandb/offline-run-*"))]
    subprocess.run(command, env=environment(folder, server), cwd=folder, capture_output=True, timeout=90, check=True)
    kept = server.run("off")
    assert [row["i"] for row in kept.rows] == list(range(40))
    assert (kept.summary["i"], kept.config, kept.state) == (39, {"c": 1}, "finished")
    (arrived,) = server.artifacts()
    assert (arrived.version, arrived.aliases, arrived.contents["a"].read_text()) == ("v0", ["latest"], "offline")


@pytest.mark.slow
def test_faults_that_the_client_survives_lose_nothing(server: WandbServer, tmp_path: Path) -> None:
    server.fault("hang", "graphql RunResumeStatus", seconds=3)
    server.fault("status", "file_stream", code=500, count=2)
    server.fault("drop", "put artifact/", after_bytes=100_000, count=1)
    server.fault("throttle", "put artifact/", bytes_per_second=900_000)
    server.fault("status", "graphql CommitArtifact", code=503, count=1)
    out = run(ROWS, "15", "x", folder=tmp_path / "run", server=server)
    assert "VERIFIED" in out
    assert [row["i"] for row in server.run("rows").rows] == list(range(15))
    struck = {each["label"].split(" tester")[0] for each in server.requests() if each.get("fault")}
    assert struck == {"file_stream", "put artifact/x", "graphql CommitArtifact"}
    seconds = {each["label"]: each["seconds"] for each in server.requests() if not each.get("fault")}
    assert seconds["put artifact/x"] > 0.3
    assert seconds["graphql RunResumeStatus"] > 0.1


@pytest.mark.slow
def test_faults_that_the_client_does_not_survive_are_seen(server: WandbServer, tmp_path: Path) -> None:
    server.fault("error", "graphql CommitArtifact", count=1)
    server.fault("corrupt", "put artifact/damaged")
    server.fault("drop", "get artifact/cut", after_bytes=1000)
    names = ("refused", "damaged", "cut", "good")
    out = run(ROWS, "1", *names, folder=tmp_path / "run", server=server)
    refused, damaged, cut, good = (line for line in out.splitlines() if line.startswith(names))
    assert "FAILED ArtifactSaver.commitArtifact" in refused
    assert "FAILED Digest mismatch" in damaged
    assert "FAILED" in cut
    assert "VERIFIED" in good
    assert [(each.version, each.state) for each in server.artifacts()] == [
        *((None, "PENDING"), ("v0", "COMMITTED"), ("v1", "COMMITTED"), ("v2", "COMMITTED"))
    ]


@pytest.mark.slow
def test_a_killed_server_comes_back_with_all_it_had(server: WandbServer, tmp_path: Path) -> None:
    script = begin(ROWS, "40", "x", folder=tmp_path / "run", server=server)
    try:
        wait_for(lambda: server.runs() and len(server.runs()[0].rows) > 5)
        address = server.url
        server.kill()
        assert len(server.run("rows").rows) > 5
        time.sleep(0.5)
        server.start()
    finally:
        assert "VERIFIED" in finish(script)
    assert server.url == address
    assert [row["i"] for row in server.run("rows").rows] == list(range(40))
    before = (server.runs(), server.artifacts())
    server.stop()
    server.start()
    assert (server.runs(), server.artifacts()) == before


@pytest.mark.slow
def test_a_stop_request_reaches_the_script(server: WandbServer, tmp_path: Path) -> None:
    script = begin(STOPPED, folder=tmp_path / "run", server=server)
    try:
        wait_for(lambda: server.runs() and server.runs()[0].rows)
        server.request_stop("stopped", "p")
    finally:
        assert "STOPPED" in finish(script)
    assert server.run("stopped").state == "killed"


def test_an_agent_is_given_runs_resumes_and_stops(server: WandbServer, tmp_path: Path) -> None:
    told = json.loads(run(SWEPT, folder=tmp_path / "run", server=server).splitlines()[-1])
    assert told["before"] == "PENDING"
    assert told["first"] == ["run", {"a": 1, "b": "x"}, []]
    assert told["again"] == ["resume", True, True, 1]
    assert told["second"] == ["run", {"a": 2, "b": "x"}]
    assert told["cancelled"] == [[["stop", server.runs()[1].id, {}]], [["exit", None, {}]], "CANCELED"]
    assert told["runs"] == [[True, "finished"], [False, "pending"]]
    assert server.unknown() == []


def test_faults_strike_the_front_page_too(server: WandbServer) -> None:
    # What the harness asks to learn whether the server is there.
    assert server_answers(server.url)
    server.fault("status", "app", code=503, count=1)
    assert not server_answers(server.url)
    server.fault("hang", "", seconds=1)
    assert not server_answers(server.url, timeout=0.2)
    assert server_answers(server.url)


def test_what_the_server_does_not_know_is_listed(tmp_path: Path) -> None:
    with WandbServer(tmp_path / "server") as server:
        key = "Basic YXBpOjAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVmMDEyMzQ1Njc="
        assert ask(server, "/graphql", {"query": "query Q { nothing }"}, key) == 400
        assert ask(server, "/elsewhere", {}, key) == 404
        assert ask(server, "/graphql", {"query": "query V { viewer { id } }"}, key) == 200
        assert ask(server, "/graphql", {"query": "query V { viewer { id } }"}, "Basic eDp5") == 401
        assert [each["path"] for each in server.unknown()] == ["/graphql", "/elsewhere"]
        assert "Cannot query field 'nothing'" in server.unknown()[0]["unknown"]["errors"][0]


def ask(server: WandbServer, path: str, body: Any, key: str) -> int:
    headers = {"Authorization": key, "Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)  # noqa: S310 - ours
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
