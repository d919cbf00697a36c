"""
Runs with artifacts, scenario by scenario: a script for a process of its own, with its working directory to itself.

`python -m tests.support.wandb.artifact_scenarios NAME ...` plays them against the server of WANDB_BASE_URL and leaves
what each tells in results.json. Two scenarios of one name, with _first and _second, are two attempts of a run.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb

from harness.tracking import TrackingConfig
from harness.tracking.artifacts import queue as uploads
from harness.tracking.artifacts.log import Artifacts

SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {}
MESSAGES: list[str] = []


class _Keeps(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        MESSAGES.append(record.getMessage())


def scenario(play: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    SCENARIOS[play.__name__] = play
    return play


# The server, from the client's process.


def fault(kind: str, match: str = "", **options: float) -> None:
    _control("POST", {"kind": kind, "match": match, **options})


def heal() -> None:
    _control("DELETE", {})


def _control(method: str, body: dict[str, Any]) -> None:
    address = f"{os.environ['WANDB_BASE_URL']}/_control/faults"
    request = urllib.request.Request(address, json.dumps(body).encode(), method=method)  # noqa: S310 - our own server
    urllib.request.urlopen(request, timeout=10).close()  # noqa: S310


# A run, its artifacts, and its output_dir, which is called like the run.


def opened(
    run_id: str, *, mode: str = "online", resume: str | None = None, suffix: str | None = None, **flags: Any
) -> Any:
    out = Path(run_id).absolute()
    out.mkdir(exist_ok=True)
    quick = {f"x_{what}_retry_wait_{end}_seconds": 1 for what in ("graphql", "file_transfer") for end in ("min", "max")}
    settings = wandb.Settings(silent=True, init_timeout=30, finish_timeout=5, **quick)
    run = wandb.init(project="p", id=run_id, dir=".", mode=mode, resume=resume, settings=settings)
    config = TrackingConfig(**{"wandb_log_model": "checkpoint", "wandb_finish_timeout": 20, **flags})
    return run, Artifacts(run, config, suffix=suffix or run_id, output_dir=out), out


def checkpoint(out: Path, step: int, size: int = 1000) -> Path:
    folder = out / f"checkpoint-{step}"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(f"{out.name} {step} ".encode() + bytes(size))
    (folder / "sub" / "deep" / "state.bin").write_bytes(f"deep {out.name} {step}".encode())
    (folder / "empty").touch()
    return folder


def save(
    artifacts: Artifacts, out: Path, step: int, *, best: bool = False, size: int = 1000, metadata: Any = None
) -> float:
    """Log a checkpoint and delete it, as --save_total_limit may; returns the seconds that logging took."""
    folder = checkpoint(out, step, size)
    began = time.perf_counter()
    artifacts.log_checkpoint(folder, step=step, epoch=step / 3, is_best=best, metadata=metadata or {})
    took = time.perf_counter() - began
    shutil.rmtree(folder)
    return took


def final(artifacts: Artifacts, out: Path, **metadata: Any) -> None:
    files = [out / "model.safetensors", out / "config.json"]
    for file in files:
        file.write_text(f"final {out.name} {file.name}")
    artifacts.log_model(files, architecture="Model()", metadata={"final_model": True, **metadata})


def committed(artifacts: Artifacts, count: int, seconds: float = 30) -> None:
    """Return when so many are in W&B."""
    end = time.monotonic() + seconds
    while len(artifacts._uploads._committed) < count:
        assert time.monotonic() < end, artifacts._uploads._waiting
        time.sleep(0.02)


def closed(run: Any, artifacts: Artifacts, limit: float | None = None) -> dict[str, Any]:
    """End the run; returns what is said of its artifacts, and the seconds that it took."""
    began = time.perf_counter()
    result = artifacts.close(limit)
    seconds = time.perf_counter() - began
    assert artifacts.close() is result
    heal()  # else wandb's own process goes on trying
    run.finish()
    pending = [[each.name, each.aliases, each.reason] for each in result.pending]
    told = {"committed": result.committed, "pending": pending, "staged": result.staged}
    return {**told, "command": result.command, "line": result.describe(), "seconds": seconds}


@scenario
def whole_way() -> dict[str, Any]:
    # The suffix can't be a name as it is.
    run, artifacts, out = opened("whole", suffix="a b/c:ü", wandb_registry="MyModel")
    artifacts.log_architecture("Model()", metadata={"initial_model": True, "model_config": {"a": float("nan")}})
    numbers = {"train/loss": 0.5, "eval/loss": float("inf"), "x": float("nan"), "model/num_parameters": 7}
    save(artifacts, out, 100, metadata=numbers)
    save(artifacts, out, 200, best=True)
    save(artifacts, out, 300)
    final(artifacts, out, **numbers)
    told = closed(run, artifacts)
    places = [Path(os.environ[f"WANDB_{kind}_DIR"]) for kind in ("CACHE", "DATA")]
    copies = [str(path) for place in places for path in place.rglob("*") if path.is_file() and path.suffix != ".log"]
    return {**told, "copies": copies, "left": sorted(path.name for path in out.rglob("*"))}


@scenario
def no_copy() -> dict[str, Any]:
    run, artifacts, out = opened("nocopy")
    fault("hang", "put artifact/")
    folder = checkpoint(out, 1, size=5_000_000)
    model = folder / "model.safetensors"

    def used() -> int:
        return sum(path.stat().st_blocks * 512 for path in {each.stat().st_ino: each for each in _files()}.values())

    before, links = used(), model.stat().st_nlink
    artifacts.log_checkpoint(folder, step=1, epoch=1, is_best=False, metadata={})
    time.sleep(1)  # it is being uploaded
    found = {"grown_bytes": used() - before, "links": [links, model.stat().st_nlink]}
    heal()
    return {**found, **closed(run, artifacts), "after": model.stat().st_nlink}


def _files() -> list[Path]:
    return [path for path in Path().rglob("*") if path.is_file()]


@scenario
def names_of_transformers() -> dict[str, Any]:
    run, artifacts, out = opened("tnames", wandb_artifact_names="transformers")
    artifacts.log_architecture("Model()", metadata={})
    save(artifacts, out, 1)
    final(artifacts, out)
    return closed(run, artifacts)


@scenario
def end_only() -> dict[str, Any]:
    run, artifacts, out = opened("endonly", wandb_log_model="end")
    save(artifacts, out, 1)
    final(artifacts, out)
    return closed(run, artifacts)


@scenario
def refused_once() -> dict[str, Any]:
    uploads.RETRY_SECONDS = (0.1, 0.1)
    run, artifacts, out = opened("refused")
    fault("status", "graphql CommitArtifact", code=400, count=1)
    save(artifacts, out, 1)
    save(artifacts, out, 2, best=True)
    return closed(run, artifacts)


@scenario
def cut_and_500() -> dict[str, Any]:
    run, artifacts, out = opened("cut")
    fault("drop", "put artifact/model", after_bytes=50_000, count=1)
    fault("status", "graphql CreateArtifactFiles", code=500, count=1)
    save(artifacts, out, 1, size=300_000)
    committed(artifacts, 1)
    return closed(run, artifacts)


@scenario
def set_aside() -> dict[str, Any]:
    uploads.RETRY_SECONDS, uploads.ASIDE_SECONDS = (0.1, 0.1), 0.5
    run, artifacts, out = opened("aside")
    fault("status", "graphql CommitArtifact", code=400, count=3)
    save(artifacts, out, 1, best=True)
    save(artifacts, out, 2)
    save(artifacts, out, 3, best=True)
    save(artifacts, out, 4)
    committed(artifacts, 4)  # without close: by itself
    return closed(run, artifacts)


@scenario
def keep() -> dict[str, Any]:
    # Another run has logged into the same collection; the user has named one of ours.
    other, theirs, out = opened("other", suffix="shared")
    save(theirs, out, 1)
    closed(other, theirs)
    run, artifacts, out = opened("keeper", suffix="shared", wandb_keep_checkpoints=2)
    save(artifacts, out, 1)
    committed(artifacts, 1)
    named = wandb.Api().artifact("tester/p/checkpoint-shared:latest")
    named.aliases.append("mine")
    named.save()
    for step in range(2, 8):
        save(artifacts, out, step, best=step == 3)
    return closed(run, artifacts)


@scenario
def resumed() -> dict[str, Any]:
    run, artifacts, out = opened("again")
    artifacts.log_architecture("Model()", metadata={"initial_model": True})
    final(artifacts, out)
    closed(run, artifacts)
    run, artifacts, out = opened("again", resume="allow")
    artifacts.log_architecture("Model()", metadata={"initial_model": True})
    return closed(run, artifacts)


@scenario
def bad_registry() -> dict[str, Any]:
    uploads.RETRY_SECONDS = (0.1, 0.1)
    run, artifacts, out = opened("badreg", wandb_log_model="end", wandb_registry="wandb-registry-nowhere/M")
    final(artifacts, out)
    return closed(run, artifacts)


@scenario
def refused_always() -> dict[str, Any]:
    uploads.RETRY_SECONDS = (0.1, 0.1)
    run, artifacts, out = opened("stuck")
    fault("status", "graphql CommitArtifact", code=400)
    save(artifacts, out, 1)
    return closed(run, artifacts)


@scenario
def changed_on_the_disk() -> dict[str, Any]:
    run, artifacts, out = opened("changed")
    fault("hang", "put artifact/")
    save(artifacts, out, 1)
    save(artifacts, out, 2)
    staged = sorted((out / "wandb-artifacts").glob("*/files/model.safetensors"))[1]
    staged.write_text("rewritten in place")
    heal()
    return closed(run, artifacts)


@scenario
def slow_uploads() -> dict[str, Any]:
    run, artifacts, out = opened("slow")
    fault("throttle", "put artifact/", bytes_per_second=1_000_000)
    took = [save(artifacts, out, step, best=step in (2, 5), size=200_000) for step in range(1, 9)]
    committed(artifacts, 8)
    return {**closed(run, artifacts), "took": took}


@scenario
def unexpected_kinds() -> dict[str, Any]:
    uploads.RETRY_SECONDS = (0.1, 0.1)
    run, artifacts, out = opened("kinds")
    run.log_artifact(wandb.Artifact("checkpoint-kinds", "dataset")).wait()
    save(artifacts, out, 1)  # wandb raises ValueError: the collection has another type
    artifacts.log_checkpoint(out / "absent", step=2, epoch=1, is_best=False, metadata={})
    return closed(run, artifacts)


@scenario
def limited() -> dict[str, Any]:
    run, artifacts, out = opened("limited")
    fault("hang", "put artifact/")
    save(artifacts, out, 1)
    save(artifacts, out, 2, best=True)
    first = closed(run, artifacts, limit=1)
    run, artifacts, out = opened("limited", resume="must")
    save(artifacts, out, 3)
    return {"first": first, **closed(run, artifacts)}


@scenario
def offline() -> dict[str, Any]:
    run, artifacts, out = opened("offline", mode="offline")
    run.log({"a": 1})
    artifacts.log_architecture("Model()", metadata={})
    for step in range(1, 5):
        save(artifacts, out, step, best=step == 2)
    final(artifacts, out)
    return closed(run, artifacts)


@scenario
def killed_first() -> dict[str, Any]:
    run, artifacts, out = opened("killed")
    run.log({"a": 1})
    fault("hang", "put artifact/")
    save(artifacts, out, 1)
    save(artifacts, out, 2, best=True)
    time.sleep(60)  # somebody kills it
    return {}


@scenario
def killed_second() -> dict[str, Any]:
    run, artifacts, out = opened("killed", resume="must")
    save(artifacts, out, 3)
    return closed(run, artifacts)


def main(names: list[str]) -> None:
    logging.getLogger("harness").addHandler(_Keeps())
    logging.getLogger("harness").setLevel("INFO")
    patience = uploads.RETRY_SECONDS, uploads.ASIDE_SECONDS
    results: dict[str, Any] = {}
    for name in names:
        MESSAGES.clear()
        began = time.perf_counter()
        try:
            results[name] = {**SCENARIOS[name](), "messages": list(MESSAGES)}
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        heal()
        wandb.finish()
        uploads.RETRY_SECONDS, uploads.ASIDE_SECONDS = patience
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    Path("results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
