"""What a run has left in its .wandb file: LevelDB's log format around wandb's protobuf records."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC, HEADER_BYTES, BLOCK_BYTES, CHUNK_HEADER = b":W&B", 7, 32768, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class TransactionLog:
    """
    One life of a run: its rows with W&B's own columns, its summary, and its exit code if it has ended.

    `started_at`: seconds since 1970. `entity` is "" where the run went to the user's default one. `resumes`: it was
    opened to go on behind rows that the server may have.
    """

    folder: Path
    entity: str
    project: str
    run_id: str
    started_at: float
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    exit_code: int | None
    is_preempting: bool
    resumes: bool = False


def read_log(path: Path) -> TransactionLog | None:
    """Read a .wandb file; None if it was cut off before it named its run. Raises OSError and ValueError."""
    run: Any = None
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    exit_code, is_preempting = None, False
    for record, _ in read_records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        elif kind == "history":
            rows.append(_put({}, record.history.item))
        elif kind == "summary":
            _put(summary, record.summary.update)
            _remove(summary, record.summary.remove)
        elif kind == "preempting":
            is_preempting = True
        elif kind == "exit" and exit_code is None:  # a second one is of the process, not of the run
            exit_code = int(record.exit.exit_code)
    if run is None:
        return None
    return TransactionLog(
        folder=path.parent,
        entity=run.entity,
        project=run.project,
        run_id=run.run_id,
        started_at=run.start_time.seconds + run.start_time.nanos / 1e9,
        rows=rows,
        summary=summary,
        exit_code=exit_code,
        is_preempting=is_preempting,
        resumes=bool(run.resume),
    )


def read_records(data: bytes) -> Iterator[tuple[Any, int]]:
    """
    The whole records in their order, each with the number of bytes up to its end.

    What a kill has torn off at the end is left out. Raises ValueError for another kind of file.
    """
    from wandb.proto import wandb_internal_pb2

    if data and data[: len(MAGIC)] != MAGIC:
        raise ValueError("it is no .wandb file")
    position, body = HEADER_BYTES, b""
    while position + CHUNK_HEADER.size <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < CHUNK_HEADER.size:
            position += left
            continue
        checksum, size, kind = CHUNK_HEADER.unpack_from(data, position)
        if kind == size == 0:  # the rest of a block
            position += left
            continue
        position += CHUNK_HEADER.size
        chunk = data[position : position + size]
        if zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            return
        position += size
        body = chunk if kind in (WHOLE, FIRST) else body + chunk
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(body)
            yield record, position


def _put(values: dict[str, Any], items: Iterable[Any]) -> dict[str, Any]:
    """The values, with those of the items at their places in them."""
    for item in items:
        place = values
        *folders, name = item.nested_key or [item.key]
        for folder in folders:
            if not isinstance(place.get(folder), dict):
                place[folder] = {}
            place = place[folder]
        place[name] = json.loads(item.value_json)
    return values


def _remove(values: dict[str, Any], items: Iterable[Any]) -> None:
    for item in items:
        place = values
        *folders, name = item.nested_key or [item.key]
        for folder in folders:
            place = place.get(folder, {})
        place.pop(name, None)
