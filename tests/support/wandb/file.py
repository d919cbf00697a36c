"""A .wandb file: all that a run left in it, in a form that tests compare, and one made of records."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from wandb.proto import wandb_internal_pb2 as pb

from harness.tracking.rows.wandb_file import HEADER_BYTES, encode, read_records


@dataclass(frozen=True)
class RecordedArtifact:
    """What an offline run will upload; `files` are where it lies, by its name in the artifact."""

    collection: str
    type: str
    aliases: list[str]
    metadata: dict[str, Any]
    files: dict[str, Path]


@dataclass
class WandbFile:
    path: Path
    run_id: str = ""
    project: str = ""
    display_name: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    artifacts: list[RecordedArtifact] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    is_preempting: bool = False


def read(path: Path) -> WandbFile:
    """The run in one .wandb file. Raises ValueError where the file is torn."""
    run = WandbFile(path)
    for record in _whole_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.project, run.display_name = record.run.project, record.run.display_name
            run.run_id, run.group, run.tags = record.run.run_id, record.run.run_group, list(record.run.tags)
            run.config |= _values(record.run.config.update)
        elif kind == "config":
            run.config |= _values(record.config.update)
        elif kind == "summary":
            run.summary |= _values(record.summary.update)
        elif kind == "history":
            run.rows.append(_values(record.history.item))
        elif kind == "metric":
            run.metrics.append(MessageToDict(record.metric))
        elif kind == "artifact":
            run.artifacts.append(_artifact(record.artifact))
        elif kind == "preempting":
            run.is_preempting = True
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def read_all(folder: Path) -> list[WandbFile]:
    """Every run below `folder`, oldest first."""
    return [read(path) for path in sorted(folder.rglob("run-*.wandb"), key=lambda path: path.parent.name)]


def _artifact(record: Any) -> RecordedArtifact:
    assert not record.manifest.manifest_file_path, "a manifest in a file of its own is not read here"
    files = {entry.path: Path(entry.local_path) for entry in record.manifest.contents}
    return RecordedArtifact(record.name, record.type, list(record.aliases), json.loads(record.metadata or "{}"), files)


def _whole_records(path: Path) -> list[Any]:
    data = path.read_bytes()
    found = list(read_records(data))
    end = found[-1][1] if found else HEADER_BYTES
    if end != len(data):
        raise ValueError(f"torn behind byte {end}")
    return [record for record, _ in found]


def _values(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def written(path: Path, records: list[Any], *, torn_bytes: int = 0) -> Path:
    """A .wandb file of these records, whose last bytes a kill has torn off."""
    data = b":W&B\xe1\xbe\x00" + encode(record.SerializeToString() for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[: len(data) - torn_bytes])
    return path


def records_of(run_id: str, *, start: int, rows: int, size: int = 10) -> list[Any]:
    """What an attempt that began at `start` (seconds) leaves: a run, rows with a text of `size`, exit code 3."""
    records = [pb.Record(run=pb.RunRecord(run_id=run_id, project="p"))]
    records[0].run.start_time.seconds = start
    for step in range(rows):
        items = {"_step": step, "text": "x" * size}
        history = [pb.HistoryItem(nested_key=[name], value_json=json.dumps(value)) for name, value in items.items()]
        summary = [pb.SummaryItem(nested_key=["nested", "step"], value_json=str(step))]
        records += [
            pb.Record(history=pb.HistoryRecord(item=history)),
            pb.Record(summary=pb.SummaryRecord(update=summary)),
        ]
    return [*records, pb.Record(exit=pb.RunExitRecord(exit_code=3))]
