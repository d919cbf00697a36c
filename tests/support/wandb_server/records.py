"""What the server holds, as plain records: read from its folder, whether it runs or not."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artifacts import Artifacts
from .database import Database, Row
from .runs import OUTPUT, Runs


@dataclass(frozen=True)
class RunRecord:
    id: str
    name: str
    entity: str
    project: str
    config: dict[str, Any]
    raw_config: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    state: str
    exit_code: int | None
    preempting: bool
    tags: list[str]
    group: str | None
    notes: str | None
    job_type: str | None
    host: str | None
    program: str | None
    git_commit: str | None
    files: dict[str, Path]
    output: list[str]
    alerts: list[dict[str, Any]]
    sweep: str | None


@dataclass(frozen=True)
class ArtifactRecord:
    entity: str
    project: str
    collection: str
    type: str
    version: str | None
    aliases: list[str]
    metadata: dict[str, Any]
    description: str | None
    files: dict[str, tuple[int, str]]
    contents: dict[str, Path]
    state: str
    digest: str
    logged_by: str | None
    used_by: list[str]

    @property
    def name(self) -> str:
        return f"{self.entity}/{self.project}/{self.collection}:{self.version}"


@dataclass(frozen=True)
class LinkRecord:
    target: str
    version: str
    aliases: list[str]
    source: str


def read_runs(folder: Path, silence_seconds: float) -> list[RunRecord]:
    """In the order of their creation."""
    database = Database(folder)
    try:
        found = database.all("SELECT * FROM runs ORDER BY id")
        return [_run(database, Runs(database, silence_seconds), row) for row in found]
    finally:
        database.close()


def _run(database: Database, runs: Runs, row: Row) -> RunRecord:
    project = database.get("projects", row["project_id"])
    assert project
    config = json.loads(row["config"])
    return RunRecord(
        id=row["name"],
        name=row["display_name"],
        entity=project["entity"],
        project=project["name"],
        config={name: value["value"] for name, value in config.items() if name != "_wandb"},
        raw_config=config,
        summary=json.loads(row["summary_metrics"]),
        rows=runs.rows(row),
        state=runs.state(row),
        exit_code=row["exit_code"],
        preempting=bool(row["preempting"]),
        tags=json.loads(row["tags"]),
        group=row["group_name"],
        notes=row["notes"],
        job_type=row["job_type"],
        host=row["host"],
        program=row["program"],
        git_commit=row["git_commit"],
        files={file["name"]: runs.file_path(row, file["name"]) for file in runs.files(row)},
        output=[_text(line) for line in runs.lines(row, OUTPUT)],
        alerts=database.all("SELECT title, text, severity FROM alerts WHERE run_id = ?", row["id"]),
        sweep=row["sweep_name"],
    )


def _text(line: str) -> str:
    """A line of output.log is text, or JSON around it."""
    return str(json.loads(line).get("content", line)) if line.startswith("{") else line


def read_artifacts(folder: Path) -> list[ArtifactRecord]:
    """Every version, the pending and deleted ones too, in the order of their creation."""
    database = Database(folder)
    try:
        found = database.all("SELECT * FROM artifacts ORDER BY id")
        return [_artifact(database, Artifacts(database), row) for row in found]
    finally:
        database.close()


def _artifact(database: Database, artifacts: Artifacts, row: Row) -> ArtifactRecord:
    collection = database.get("collections", row["collection_id"])
    assert collection
    project = database.get("projects", collection["project_id"])
    assert project
    logged_by = database.get("runs", row["run_id"])
    used_by = database.all("SELECT name FROM runs JOIN uses ON run_id = id WHERE artifact_id = ?", row["id"])
    entries = artifacts.entries(row)
    own = {name: entry for name, entry in entries.items() if not entry.get("ref")}
    return ArtifactRecord(
        entity=project["entity"],
        project=project["name"],
        collection=collection["name"],
        type=collection["type"],
        version=None if row["version_index"] is None else f"v{row['version_index']}",
        aliases=[alias["alias"] for alias in artifacts.aliases(collection, row)],
        metadata=json.loads(row["metadata"] or "{}"),
        description=row["description"],
        files={name: (entry.get("size", 0), entry["digest"]) for name, entry in entries.items()},
        contents={name: artifacts.blob_of(row, entry["digest"]) for name, entry in own.items()},
        state=row["state"],
        digest=row["digest"],
        logged_by=logged_by["name"] if logged_by else None,
        used_by=[each["name"] for each in used_by],
    )


def read_links(folder: Path) -> list[LinkRecord]:
    """What is in portfolios: registries and registered models."""
    database = Database(folder)
    try:
        found = database.all(
            "SELECT memberships.*, collections.name AS collection, projects.entity, projects.name AS project"
            " FROM memberships JOIN collections ON collections.id = collection_id"
            " JOIN projects ON projects.id = project_id WHERE kind = 'portfolio' ORDER BY memberships.id"
        )
        return [_link(database, Artifacts(database), row) for row in found]
    finally:
        database.close()


def _link(database: Database, artifacts: Artifacts, row: Row) -> LinkRecord:
    source = database.get("artifacts", row["artifact_id"])
    assert source
    aliases = artifacts.aliases({"id": row["collection_id"]}, source)
    return LinkRecord(
        target=f"{row['entity']}/{row['project']}/{row['collection']}",
        version=f"v{row['version_index']}",
        aliases=[alias["alias"] for alias in aliases],
        source=_artifact(database, artifacts, source).name,
    )


def read_requests(folder: Path) -> list[dict[str, Any]]:
    path = folder / "requests.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # torn when the server was killed
            found.append(json.loads(line))
    return found
