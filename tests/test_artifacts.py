"""WANDB_LOG_MODEL with the real client against a server on this machine, faults included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.tracking.staging import FOLDER, waiting
from tests.support.wandb_server import WandbServer

ROOT = Path(__file__).parent.parent
PROJECT = "p"
CLI = (sys.executable, "-m", "harness.tracking")

# What the scenarios share. `out` is the output_dir of a run; `opened(id)` is a run and its artifacts.
PRELUDE = """
import json, logging, os, pathlib, shutil, signal, sys, time, traceback, urllib.request
import wandb
from harness.tracking import uploads
from harness.tracking.artifacts import Artifacts

MESSAGES = []
class Keeps(logging.Handler):
    def emit(self, record):
        MESSAGES.append(record.getMessage())
logging.getLogger("harness").addHandler(Keeps())
logging.getLogger("harness").setLevel("INFO")

def control(method, what, body):
    address = os.environ["WANDB_BASE_URL"] + "/_control/" + what
    request = urllib.request.Request(address, json.dumps(body).encode(), method=method)
    urllib.request.urlopen(request, timeout=10).close()
def fault(kind, match="", **options):
    control("POST", "faults", {"kind": kind, "match": match, **options})
def heal():
    control("DELETE", "faults", {})

def opened(run_id, out=None, **options):
    out = pathlib.Path(out or run_id).absolute()
    out.mkdir(exist_ok=True)
    settings = wandb.Settings(silent=True, init_timeout=30)
    run = wandb.init(project="p", id=run_id, dir=".", resume=options.pop("resume", None), settings=settings)
    options = {"log_model": "checkpoint", "suffix": run_id, "finish_timeout": 20, "output_dir": out, **options}
    return run, Artifacts(run, **options), out

def checkpoint(out, step, size=1000):
    folder = out / f"checkpoint-{step}"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(f"{out.name} {step} ".encode() + bytes(size))
    (folder / "sub" / "deep" / "state.bin").write_bytes(f"deep {out.name} {step}".encode())
    (folder / "empty").touch()
    return folder

def save(artifacts, out, step, *, best=False, prune=True, size=1000, metadata=None):
    folder = checkpoint(out, step, size)
    began = time.perf_counter()
    artifacts.log_checkpoint(folder, step=step, epoch=step / 3, is_best=best, metadata=metadata or {})
    took = time.perf_counter() - began
    if prune:
        shutil.rmtree(folder)
    return took

def final(artifacts, out, **metadata):
    files = [out / "model.safetensors", out / "config.json"]
    for file in files:
        file.write_text(f"final {out.name} {file.name}")
    artifacts.log_model(files, architecture="Model()", metadata={"final_model": True, **metadata})

def committed(artifacts, count, seconds=30):
    end = time.monotonic() + seconds
    while len(artifacts._uploads._committed) < count:
        assert time.monotonic() < end, artifacts._uploads._waiting
        time.sleep(0.02)

def told(delivery):
    return {
        "committed": delivery.committed,
        "pending": [[each.name, each.aliases, each.reason] for each in delivery.pending],
        "staged": delivery.staged,
        "command": delivery.command,
        "line": delivery.describe(),
    }

def closed(run, artifacts):
    began = time.perf_counter()
    delivery = artifacts.close()
    seconds = time.perf_counter() - began
    assert artifacts.close() is delivery
    run.finish()
    return {**told(delivery), "seconds": seconds}
"""

SCENARIOS = """
def whole_way():
    # The suffix can't be a name as it is.
    run, artifacts, out = opened("whole", suffix="a b/c:ü", registry="MyModel", keep_checkpoints=None)
    artifacts.log_architecture("Model()", metadata={"initial_model": True, "model_config": {"a": float("nan")}})
    numbers = {"train/loss": 0.5, "eval/loss": float("inf"), "x": float("nan"), "model/num_parameters": 7}
    save(artifacts, out, 100, metadata=numbers)
    save(artifacts, out, 200, best=True)
    save(artifacts, out, 300)
    final(artifacts, out, **numbers)
    left = {"staging": sorted(path.name for path in pathlib.Path(os.environ["WANDB_DATA_DIR"]).rglob("*"))}
    result = {**closed(run, artifacts), **left}
    caches = [path for path in pathlib.Path(os.environ["WANDB_CACHE_DIR"]).rglob("*") if path.suffix != ".log"]
    files = [str(path) for path in caches if path.is_file()]
    staging = [str(path) for path in pathlib.Path(os.environ["WANDB_DATA_DIR"]).rglob("*") if path.is_file()]
    return {**result, "copies": files + staging, "left": sorted(path.name for path in out.rglob("*"))}

def no_copy():
    run, artifacts, out = opened("nocopy")
    fault("hang", "put artifact/")
    folder = checkpoint(out, 1, size=5_000_000)
    used = lambda: int(os.popen("du -sk .").read().split()[0])
    before, links = used(), (folder / "model.safetensors").stat().st_nlink
    artifacts.log_checkpoint(folder, step=1, epoch=1, is_best=False, metadata={})
    time.sleep(1)  # it is being uploaded
    found = {"grown_kb": used() - before, "links": [links, (folder / "model.safetensors").stat().st_nlink]}
    heal()
    return {**found, **closed(run, artifacts), "after": (folder / "model.safetensors").stat().st_nlink}

def names_of_transformers():
    run, artifacts, out = opened("tnames", naming="transformers")
    artifacts.log_architecture("Model()", metadata={})
    save(artifacts, out, 1)
    final(artifacts, out)
    return closed(run, artifacts)

def end_only():
    run, artifacts, out = opened("endonly", log_model="end")
    save(artifacts, out, 1)
    final(artifacts, out)
    return {**closed(run, artifacts), "again": artifacts.close().committed}

def refused_once():
    run, artifacts, out = opened("refused")
    fault("status", "graphql CommitArtifact", code=400, count=1)
    save(artifacts, out, 1)
    save(artifacts, out, 2, best=True)
    return closed(run, artifacts)

def cut_and_500():
    run, artifacts, out = opened("cut")
    fault("drop", "put artifact/", after_bytes=50_000, count=1)
    fault("status", "graphql CreateArtifactFiles", code=500, seconds=1)
    save(artifacts, out, 1, size=300_000)
    return closed(run, artifacts)

def set_aside():
    uploads.RETRY_SECONDS, uploads.ASIDE_SECONDS = (0.1, 0.1), 0.5
    run, artifacts, out = opened("aside")
    fault("status", "graphql CommitArtifact", code=400, count=3)
    save(artifacts, out, 1, best=True)
    save(artifacts, out, 2)
    save(artifacts, out, 3, best=True)
    save(artifacts, out, 4)
    committed(artifacts, 4)  # without close: by itself
    return closed(run, artifacts)

def keep():
    # Another run has logged into the same collection; the user has named one of ours.
    other, theirs, out = opened("other", suffix="shared")
    save(theirs, out, 1)
    closed(other, theirs)
    run, artifacts, out = opened("keeper", suffix="shared", keep_checkpoints=2)
    save(artifacts, out, 1)
    committed(artifacts, 1)
    named = wandb.Api().artifact("tester/p/checkpoint-shared:latest")
    named.aliases.append("mine")
    named.save()
    for step in range(2, 8):
        save(artifacts, out, step, best=step == 3)
    return closed(run, artifacts)

def resumed():
    run, artifacts, out = opened("again")
    artifacts.log_architecture("Model()", metadata={"initial_model": True})
    final(artifacts, out)
    closed(run, artifacts)
    run, artifacts, out = opened("again", resume="allow")
    artifacts.log_architecture("Model()", metadata={"initial_model": True})
    return closed(run, artifacts)

def bad_registry():
    uploads.RETRY_SECONDS = (0.1, 0.1)
    run, artifacts, out = opened("badreg", log_model="end", registry="wandb-registry-nowhere/M")
    final(artifacts, out)
    return closed(run, artifacts)

def damaged_on_the_server():
    uploads.RETRY_SECONDS = (0.1, 0.1)
    run, artifacts, out = opened("damaged")
    fault("corrupt", "put manifest/", count=1)
    save(artifacts, out, 1)
    return closed(run, artifacts)

def changed_on_the_disk():
    run, artifacts, out = opened("changed")
    fault("hang", "put artifact/", seconds=1)
    save(artifacts, out, 1)
    save(artifacts, out, 2)
    staged = sorted((out / "wandb-artifacts").glob("*/files/model.safetensors"))[1]
    staged.write_text("rewritten in place")
    return closed(run, artifacts)

def slow_uploads():
    run, artifacts, out = opened("slow")
    fault("throttle", "put artifact/", bytes_per_second=1_000_000)
    took = [save(artifacts, out, step, best=step in (2, 5), size=200_000) for step in range(1, 9)]
    return {**closed(run, artifacts), "took": took}

def unexpected_kinds():
    uploads.RETRY_SECONDS = (0.1, 0.1)
    run, artifacts, out = opened("kinds")
    other = wandb.Artifact("checkpoint-kinds", "dataset")
    run.log_artifact(other).wait()
    save(artifacts, out, 1)  # wandb raises ValueError: the collection has another type
    artifacts.log_checkpoint(out / "absent", step=2, epoch=1, is_best=False, metadata={})
    return closed(run, artifacts)

results = {}
for name in sys.argv[1:]:
    MESSAGES.clear()
    patience = uploads.RETRY_SECONDS, uploads.ASIDE_SECONDS
    try:
        results[name] = {**globals()[name](), "messages": list(MESSAGES)}
    except Exception:
        results[name] = {"error": traceback.format_exc()}
    if wandb.run is not None:
        wandb.finish()
    uploads.RETRY_SECONDS, uploads.ASIDE_SECONDS = patience
    heal()
pathlib.Path("results.json").write_text(json.dumps(results))
"""

PLAIN = [
    *("whole_way", "no_copy", "names_of_transformers", "end_only", "refused_once", "cut_and_500", "set_aside"),
    *("keep", "resumed", "bad_registry", "damaged_on_the_server", "changed_on_the_disk", "slow_uploads"),
    "unexpected_kinds",
]


def environment(folder: Path, server: WandbServer | None = None, **variables: str) -> dict[str, str]:
    """No credentials, no wandb settings, no home but `folder`'s; those of the server if there is one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
    places = {f"WANDB_{kind}_DIR": str(folder / "wandb-dirs" / kind) for kind in ("CONFIG", "CACHE", "DATA")}
    home = {"HOME": str(folder / "home"), "NETRC": str(folder / "netrc"), "PYTHONPATH": str(ROOT)}
    return {**kept, **places, **home, **(server.environment() if server else {}), **variables}


def start(
    script: str, *argv: str, folder: Path, server: WandbServer | None = None, **variables: str
) -> subprocess.Popen[str]:
    """Run a script after the prelude in a process of its own."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script, *argv],
        env=environment(folder, server, **variables),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], *, code: int = 0, timeout: float = 150) -> str:
    """What the process wrote to standard output; it must end with `code`."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, f"{out}\n{err}"
    return out


def run(script: str, *argv: str, folder: Path, server: WandbServer | None = None, **variables: str) -> Any:
    """Run a script to its end; returns the JSON of its last line."""
    return json.loads(ended(start(script, *argv, folder=folder, server=server, **variables)).splitlines()[-1])


def command(line: str, folder: Path, server: WandbServer | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command that we told the user to run."""
    line = line.replace("python -m", f"{sys.executable} -m").replace("wandb sync", f"{sys.executable} -m wandb sync")
    return subprocess.run(  # noqa: S602 - as the user would type it
        line,
        shell=True,
        env=environment(folder, server),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@contextmanager
def killed_after(process: subprocess.Popen[str], server: WandbServer, label: str) -> Iterator[None]:
    """SIGKILL the process once the server has got a request; wandb's own process dies with it."""
    end = time.monotonic() + 60
    yield
    while not any(label in each["label"] for each in server.requests()):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("wandb") / "server") as started:
        yield started


@dataclass
class Played:
    """What the scenarios returned, and the folder they ran in."""

    results: dict[str, Any]
    folder: Path

    def __getitem__(self, name: str) -> Any:
        result = self.results[name]
        assert "error" not in result, result.get("error")
        return result


@pytest.fixture(scope="module")
def played(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """All scenarios, one after the other in one process."""
    folder = tmp_path_factory.mktemp("played")
    ended(start(SCENARIOS, *PLAIN, folder=folder, server=server))
    return Played(json.loads((folder / "results.json").read_text(encoding="utf-8")), folder)


def aliases(server: WandbServer, collection: str) -> dict[str, set[str]]:
    return {
        str(found.version): set(found.aliases) for found in server.artifacts(collection) if found.state == "COMMITTED"
    }


def test_artifacts_have_the_names_aliases_and_contents_promised(played: Played, server: WandbServer) -> None:
    result = played["whole_way"]
    assert result["pending"] == []
    assert result["command"] is None
    assert result["left"] == ["config.json", "model.safetensors"]
    assert sorted(result["committed"]) == [
        *("checkpoint-a-b-c:v0", "checkpoint-a-b-c:v1", "checkpoint-a-b-c:v2", "model-a-b-c:v0", "model-a-b-c:v1"),
    ]
    assert aliases(server, "checkpoint-a-b-c") == {
        "v0": {"epoch_33.33", "checkpoint_global_step_100"},
        "v1": {"epoch_66.67", "checkpoint_global_step_200", "best"},
        "v2": {"epoch_100.0", "checkpoint_global_step_300", "latest"},
    }
    assert aliases(server, "model-a-b-c") == {"v0": {"base_model"}, "v1": {"final_model", "latest"}}
    first = server.artifacts("checkpoint-a-b-c")[0]
    assert (first.type, first.logged_by) == ("model", "whole")
    assert {name: path.read_bytes() for name, path in first.contents.items()} == {
        "model.safetensors": b"whole 100 " + bytes(1000),
        "sub/deep/state.bin": b"deep whole 100",
        "empty": b"",
    }
    base, model = server.artifacts("model-a-b-c")
    assert set(base.files) == {"model_architecture.txt"}
    assert set(model.files) == {"model_architecture.txt", "model.safetensors", "config.json"}
    assert model.contents["model.safetensors"].read_text() == "final whole model.safetensors"
    assert model.contents["model_architecture.txt"].read_text() == "Model()"


def test_metadata_is_what_was_given_and_json(played: Played, server: WandbServer) -> None:
    first = server.artifacts("checkpoint-a-b-c")[0].metadata
    assert first.pop("saved_at") == pytest.approx(time.time(), abs=600)
    assert first == {
        "train/loss": 0.5,
        "eval/loss": "Infinity",
        "x": "NaN",
        "model/num_parameters": 7,
        "run_id": "whole",
    }
    base = server.artifacts("model-a-b-c")[0].metadata
    assert base == {"initial_model": True, "model_config": {"a": "NaN"}, "run_id": "whole"}


def test_a_name_that_wandb_refuses_is_changed_and_one_line_says_so(played: Played, server: WandbServer) -> None:
    (line,) = [line for line in played["whole_way"]["messages"] if "letters, digits" in line]
    assert "...-a-b-c" in line


def test_the_final_model_is_linked_to_the_registry(played: Played, server: WandbServer) -> None:
    assert played["whole_way"]["pending"] == []
    (link,) = [link for link in server.links() if link.target.endswith("/MyModel")]
    assert link.target == "test-org/wandb-registry-model/MyModel"
    assert (link.source, set(link.aliases)) == ("tester/p/model-a-b-c:v1", {"final_model", "latest"})


def test_nothing_is_copied_on_the_disk(played: Played) -> None:
    result = played["no_copy"]
    assert result["grown_kb"] < 1000, "of a checkpoint of 5 MB"
    assert result["links"] == [1, 2]
    assert result["after"] == 1, "the link is gone when W&B has it, the checkpoint is not"
    assert len(result["committed"]) == 1
    assert played["whole_way"]["copies"] == []


def test_transformers_names_put_all_into_one_collection(played: Played, server: WandbServer) -> None:
    assert played["names_of_transformers"]["pending"] == []
    assert aliases(server, "model-tnames") == {
        "v0": {"base_model"},
        "v1": {"epoch_0.33", "checkpoint_global_step_1"},
        "v2": {"final_model", "latest"},
    }


def test_end_uploads_no_checkpoint(played: Played, server: WandbServer) -> None:
    result = played["end_only"]
    assert result["committed"] == result["again"] == ["model-endonly:v0"]
    assert server.artifacts("checkpoint-endonly") == []


def test_a_refused_upload_is_tried_again_in_its_place(played: Played, server: WandbServer) -> None:
    assert played["refused_once"]["pending"] == []
    assert aliases(server, "checkpoint-refused") == {
        "v0": {"epoch_0.33", "checkpoint_global_step_1"},
        "v1": {"epoch_0.67", "checkpoint_global_step_2", "best", "latest"},
    }


def test_a_cut_connection_and_a_sick_server_delay_it_only(played: Played, server: WandbServer) -> None:
    assert played["cut_and_500"]["pending"] == []
    (found,) = [each for each in server.artifacts("checkpoint-cut") if each.state == "COMMITTED"]
    assert found.contents["model.safetensors"].read_bytes() == b"cut 1 " + bytes(300_000)
    assert any(each.get("fault") and each["label"] == "put artifact/model.safetensors" for each in server.requests())


def test_one_that_comes_late_takes_no_alias_from_a_newer_one(played: Played, server: WandbServer) -> None:
    result = played["set_aside"]
    assert result["pending"] == []
    assert len(result["committed"]) == 4
    assert sum("could not be uploaded" in line for line in result["messages"]) == 1
    steps = {
        next(alias for alias in found if "global_step" in alias).rpartition("_")[2]: (version, found)
        for version, found in aliases(server, "checkpoint-aside").items()
    }
    assert steps["1"][0] == "v3", "the first came last"
    assert {step: found & {"best", "latest"} for step, (_, found) in steps.items()} == {
        "1": set(),
        "2": set(),
        "3": {"best"},
        "4": {"latest"},
    }


def test_keep_checkpoints_deletes_only_this_runs_unnamed_versions(played: Played, server: WandbServer) -> None:
    assert played["keep"]["pending"] == []
    kept = {
        (found.logged_by, next(alias for alias in found.aliases if "global_step" in alias).rpartition("_")[2])
        for found in server.artifacts("checkpoint-shared")
        if found.state == "COMMITTED"
    }
    # The two newest, the best, the one that the user named, and the other run's.
    assert kept == {("other", "1"), ("keeper", "1"), ("keeper", "3"), ("keeper", "6"), ("keeper", "7")}


def test_a_resumed_run_leaves_latest_to_the_final_model(played: Played, server: WandbServer) -> None:
    assert played["resumed"]["committed"] == ["model-again:v0"], "the same content stays one version"
    assert aliases(server, "model-again") == {"v0": {"base_model"}, "v1": {"final_model", "latest"}}


def test_a_link_that_fails_is_reported_with_the_command_that_works_later(
    played: Played, server: WandbServer, tmp_path: Path
) -> None:
    result = played["bad_registry"]
    assert result["committed"] == ["model-badreg:v0"]
    ((name, _, reason),) = result["pending"]
    assert name == "model-badreg:v0"
    assert "not linked to wandb-registry-nowhere/M" in reason
    assert result["command"] == (
        "python -m harness.tracking link tester/p/model-badreg:v0 --registry wandb-registry-nowhere/M "
        "--alias final_model"
    )
    failed = command(result["command"], tmp_path, server)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1), failed.stderr
    done = command(result["command"].replace("wandb-registry-nowhere/M", "Later"), tmp_path, server)
    assert done.returncode == 0, done.stderr
    (link,) = [link for link in server.links() if link.target.endswith("/Later")]
    assert (link.source, set(link.aliases)) == ("tester/p/model-badreg:v0", {"final_model", "latest"})


def test_what_arrived_otherwise_than_sent_is_not_called_delivered(played: Played) -> None:
    result = played["damaged_on_the_server"]
    assert result["committed"] == []
    assert len(result["pending"]) == 1
    assert waiting(played.folder / "damaged" / FOLDER)
    assert result["command"] == f"python -m harness.tracking upload {played.folder / 'damaged'}"


def test_what_was_changed_after_staging_is_not_uploaded(played: Played, server: WandbServer) -> None:
    result = played["changed_on_the_disk"]
    assert result["committed"] == ["checkpoint-changed:v0"]
    ((_, _, reason),) = result["pending"]
    assert "model.safetensors was changed after it was staged" in reason
    assert len([each for each in server.artifacts("checkpoint-changed") if each.state == "COMMITTED"]) == 1


def test_slow_uploads_stall_nothing_and_come_in_order(played: Played, server: WandbServer) -> None:
    result = played["slow_uploads"]
    assert sorted(result["took"])[-2] < 0.05, "one may be hit by something else on this machine"
    assert result["pending"] == []
    assert sum("slower than saves" in line for line in result["messages"]) == 1
    found = aliases(server, "checkpoint-slow")
    assert [f"checkpoint_global_step_{step}" in found[f"v{step - 1}"] for step in range(1, 9)] == [True] * 8
    assert [version for version in found if "best" in found[version]] == ["v4"]
    assert [version for version in found if "latest" in found[version]] == ["v7"]


def test_whatever_wandb_raises_reaches_the_report_only(played: Played) -> None:
    result = played["unexpected_kinds"]
    assert result["committed"] == []
    refused, absent = result["pending"]
    assert "already exists with type 'dataset'" in refused[2]
    assert "could not be staged" in absent[2]
    assert sum("could not be staged" in line for line in result["messages"]) == 1


def test_the_server_knows_every_request(played: Played, server: WandbServer) -> None:
    assert played.results
    assert server.unknown() == []
