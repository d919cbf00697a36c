"""The .wandb files that the lives of an offline run have left: counted, and made fit for `wandb sync`."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.tracking.rows.wandb_file import BLOCK_BYTES, CHUNK_HEADER, HEADER_BYTES, WHOLE, read_records

logger = logging.getLogger(__name__)

TORN = "torn-"  # before the name of a folder whose file names no run


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The file of one life: rows in it, when it began (nanoseconds), whether it ended, bytes of whole records."""

    path: Path
    rows: int
    started_at: int | None
    has_ended: bool
    num_records: int
    end: int


def read_fragment(path: Path) -> Fragment:
    """Read a .wandb file, a torn one too. Raises OSError, and ValueError for another kind of file."""
    rows, started_at, has_ended, num_records, end = 0, None, False, 0, HEADER_BYTES
    for record, end in read_records(path.read_bytes()):  # noqa: B007 - the last end is used below
        kind = record.WhichOneof("record_type")
        num_records += 1
        rows += kind == "history"
        has_ended |= kind == "exit"
        if kind == "run" and started_at is None:
            started_at = record.run.start_time.ToNanoseconds()
    return Fragment(path=path, rows=rows, started_at=started_at, has_ended=has_ended, num_records=num_records, end=end)


def collect(folders: Iterable[Path], run_id: str) -> list[Fragment]:
    """
    The fragments of a run in these folders, in the order in which they began, each fit to be synced.

    `wandb sync` stops, and says nothing, at a file whose tail is torn, and refuses one that names no run or whose
    beginning is lost: the first kind is cut behind its last whole record and gets an end, the others are moved away.
    What is counted is on the disk itself. No life may be running.
    """
    found = []
    for folder in folders:
        path = folder / f"run-{run_id}.wandb"
        try:
            fragment = _readable(path)
            if fragment is None:
                folder.rename(folder.with_name(f"{TORN}{folder.name}"))
                continue
            seal(fragment)
        except OSError as error:
            logger.warning("%s can't be read, its rows are not counted: %s", path, error)
            continue
        found.append(fragment)
    return sorted(found, key=lambda fragment: fragment.started_at or 0)


def _readable(path: Path) -> Fragment | None:
    """The fragment, None if nothing in it says whose it is. Raises OSError."""
    try:
        fragment = read_fragment(path)
    except ValueError:
        return None
    return None if fragment.started_at is None else fragment


def seal(fragment: Fragment) -> None:
    """Cut a file behind its last whole record, and add the record of an end with exit code 1 if it has none."""
    from wandb.proto import wandb_internal_pb2

    with fragment.path.open("r+b") as file:
        file.truncate(fragment.end)
        file.seek(fragment.end)
        if not fragment.has_ended:
            record = wandb_internal_pb2.Record(num=fragment.num_records + 1)
            record.exit.exit_code = 1
            body = record.SerializeToString()
            left = BLOCK_BYTES - fragment.end % BLOCK_BYTES
            if left < CHUNK_HEADER.size + len(body):
                file.write(bytes(left))  # the rest of a block that nothing fits into is zeros
            file.write(CHUNK_HEADER.pack(zlib.crc32(body, zlib.crc32(bytes([WHOLE]))), len(body), WHOLE) + body)
        file.flush()
        os.fsync(file.fileno())


def mark_synced(folders: Iterable[Path], run_id: str) -> None:
    """Say to `wandb sync` that the rows of these folders have been sent."""
    for folder in folders:
        try:
            (folder / f"run-{run_id}.wandb.synced").touch()
        except OSError as error:
            logger.debug("%s could not be marked as synced: %s", folder, error)
