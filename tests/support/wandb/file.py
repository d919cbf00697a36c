"""Read what a run left in its .wandb file: LevelDB's log format around protobuf records."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from wandb.proto import wandb_internal_pb2

HEADER, BLOCK, CHUNK_HEADER = b":W&B", 32768, struct.Struct("<IHB")
WHOLE, FIRST, LAST = 1, 2, 4


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
    for record in _records(path.read_bytes()):
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


def _records(data: bytes) -> Iterator[Any]:
    if data[:4] != HEADER:
        raise ValueError("not a .wandb file")
    position, body = 7, b""
    while position + CHUNK_HEADER.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK_HEADER.size:
            position += left
            continue
        checksum, size, kind = CHUNK_HEADER.unpack_from(data, position)
        chunk = data[position + 7 : position + 7 + size]
        if zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"torn at byte {position}")
        position += 7 + size
        body = chunk if kind in (WHOLE, FIRST) else body + chunk
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(body)
            yield record


def _values(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
