"""What W&B has of a run, from the test server or from an offline run's file, in a form that two runs share."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.parity import TIMING
from tests.support.wandb.file import read_all
from tests.support.wandb_server import WandbServer

# wandb's own and the clock's: that they are there is compared, their values can't be.
CLOCK = ("_timestamp", "_runtime")
# Written by each library for itself, from its pickled arguments or its own state.
OWN_FILES = ("training_args.bin", "harness_state.json", "metrics.jsonl")


@dataclass
class Version:
    """A version of a collection; of each file its content, or what of it can be compared."""

    type: str
    aliases: set[str]
    metadata: dict[str, Any]
    files: dict[str, Any]


@dataclass
class Seen:
    run_id: str
    about: dict[str, Any]
    config: dict[str, Any]
    axes: Any
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    files: set[str]
    collections: dict[str, list[Version]]
    card: str


def online(server: WandbServer, output_dir: Path, project: str, *, was_killed: bool = False) -> Seen:
    """
    The one run of a project, by a process that worked in the folder of `output_dir`.

    If it `was_killed` the server may hold an artifact that did not arrive whole, which is nobody's version.
    """
    folder = output_dir.parent
    (run,) = [run for run in server.runs() if run.project == project]
    collections: dict[str, list[Version]] = defaultdict(list)
    for artifact in server.artifacts():
        if artifact.logged_by == run.id and not (was_killed and artifact.state == "PENDING"):
            assert artifact.state == "COMMITTED"
            versions = collections[artifact.collection.replace(run.id, "RUN")]
            assert artifact.version == f"v{len(versions)}"
            contents = {name: _content(name, path) for name, path in artifact.contents.items()}
            versions.append(Version(artifact.type, set(artifact.aliases), _untimed(artifact.metadata), contents))
    return Seen(
        run_id=run.id,
        about={
            "git": run.git_commit is not None,
            "name": None if run.name.startswith("test-run-") else _moved(run.name, folder),  # the server's choice
            "recorded": sorted(json.loads(run.files["wandb-metadata.json"].read_text(encoding="utf-8"))),
            **{name: getattr(run, name) for name in ("entity", "tags", "group", "notes", "job_type")},
            **{name: getattr(run, name) for name in ("state", "exit_code")},
            "program": _moved(run.program, folder),
        },
        config=_moved(run.config, folder),
        axes=run.raw_config["_wandb"]["value"]["m"],
        rows=[_untimed(row) for row in run.rows],
        summary=_untimed(run.summary),
        files={name.rpartition("_")[0] if name.startswith("media/") else name for name in run.files},
        collections=dict(collections),
        card=(output_dir / "README.md").read_text(encoding="utf-8"),
    )


def offline(output_dir: Path, project: str) -> Seen:
    """The same of the run's file, wherever in that folder it is."""
    folder = output_dir.parent
    (run,) = [run for run in read_all(folder) if run.project == project]
    collections: dict[str, list[Version]] = defaultdict(list)
    for artifact in run.artifacts:
        contents = {name: _content(name, path) for name, path in artifact.files.items()}
        version = Version(artifact.type, set(artifact.aliases), _untimed(artifact.metadata), contents)
        collections[artifact.collection.replace(run.run_id, "RUN")].append(version)
    for versions in collections.values():
        for earlier in versions[:-1]:  # as it will be when they have been uploaded
            earlier.aliases.discard("latest")
    return Seen(
        run_id=run.run_id,
        about={"name": run.display_name, "group": run.group, "tags": run.tags, "exit_code": run.exit_code},
        config=_moved({name: value for name, value in run.config.items() if not name.startswith("_wandb")}, folder),
        axes=run.metrics,
        rows=[_untimed(row) for row in run.rows],
        summary=_untimed(run.summary),
        files=set(),
        collections=dict(collections),
        card=(output_dir / "README.md").read_text(encoding="utf-8"),
    )


def _moved(value: Any, folder: Path) -> Any:
    return json.loads(json.dumps(value).replace(str(folder), "FOLDER"))


def _untimed(values: Mapping[str, Any]) -> dict[str, Any]:
    masked = {name: "CLOCK" if name in CLOCK or TIMING.search(name) else value for name, value in values.items()}
    return {name: value for name, value in masked.items() if not name.startswith("_wandb")}


def _content(name: str, path: Path) -> Any:
    if name in OWN_FILES:
        return "OWN"
    if name == "trainer_state.json":
        state = json.loads(path.read_text(encoding="utf-8"))
        state["log_history"] = [_untimed(entry) for entry in state["log_history"]]
        if state["best_model_checkpoint"] is not None:
            state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
        return state
    if name.startswith("rng_state"):
        return {key: _plain(value) for key, value in torch.load(path, weights_only=False).items()}
    if name in ("optimizer.pt", "scheduler.pt"):  # torch names what is in it after the file, but not in a stream
        return _plain(torch.load(path, weights_only=True))
    return hashlib.md5(path.read_bytes()).hexdigest()  # noqa: S324


def _plain(value: Any) -> Any:
    """Something that == compares, of a state."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        return bytes(np.asarray(value))
    return tuple(map(_plain, value)) if isinstance(value, tuple | list) else value
