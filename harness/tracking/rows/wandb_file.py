"""
The .wandb file of one attempt of a run, read and written: LevelDB's log format around wandb's protobuf records.

It lies in a folder of its own, `run-*` online and `offline-run-*` offline. wandb flushes it now and then, so that a
kill tears it; what an offline run left is then made fit for `wandb sync`.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from harness.tracking.damage import DEEPEST, load_json

logger = logging.getLogger(__name__)

MAGIC, HEADER_BYTES, BLOCK_BYTES, CHUNK_HEADER = b":W&B", 7, 32768, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
# What is read here is what wandb 0.31 writes: format 0 with this mark, for readers of this version and newer.
MARK, FORMAT, READER, WRITER = b"\xe1\xbe", 0, (0, 70, 0), "0.31"
TORN = "torn-"  # before the name of a folder whose file names no run


class UnknownFormError(ValueError):
    """The file is one of wandb's, but of a version, or with values, that this reader does not know."""


@dataclass(frozen=True, kw_only=True)
class TransactionLog:
    """
    One attempt of a run: its rows with W&B's own columns, its summary, and its exit code if it has ended.

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
    return LogReader(path).read()


class LogReader:
    """Reads a .wandb file that grows: each time only what was written since the last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._end = 0, 0
        self._run: Any = None
        self._rows: list[dict[str, Any]] = []
        self._summary: dict[str, Any] = {}
        self._exit_code: int | None = None
        self._is_preempting = False

    def read(self) -> TransactionLog | None:
        """Return what the file holds by now, as `read_log` does. What it returned before may change."""
        stat = self._path.stat()
        if stat.st_ino != self._inode or stat.st_size < self._end:  # another file
            self._forget(stat.st_ino)
        num_unknown = 0
        for record, end in read_records(self._path, start=self._end):
            num_unknown += not self._take(record) and _has_unknown(record)
            self._end = end
        if num_unknown:
            logger.warning(
                "%s: %d records are of kinds that wandb %s does not have, and passed over.",
                *(self._path, num_unknown, WRITER),
            )
        if self._run is None:
            return None
        return TransactionLog(
            folder=self._path.parent,
            entity=self._run.entity,
            project=self._run.project,
            run_id=self._run.run_id,
            started_at=self._run.start_time.seconds + self._run.start_time.nanos / 1e9,
            rows=self._rows,
            summary=self._summary,
            exit_code=self._exit_code,
            is_preempting=self._is_preempting,
            resumes=bool(self._run.resume),
        )

    def _forget(self, inode: int) -> None:
        self._inode, self._end = inode, 0
        self._run, self._rows, self._summary = None, [], {}
        self._exit_code, self._is_preempting = None, False

    def _take(self, record: Any) -> bool:
        """Take a record; returns whether its kind is one of this version of wandb."""
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self._run = record.run
        elif kind == "history":
            self._rows.append(_put({}, record.history.item))
        elif kind == "summary":
            _put(self._summary, record.summary.update)
            _remove(self._summary, record.summary.remove)
        elif kind == "preempting":
            self._is_preempting = True
        elif kind == "exit" and self._exit_code is None:  # a second one is of the process, not of the run
            self._exit_code = int(record.exit.exit_code)
        return kind is not None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .wandb file, one at a time. Raises OSError and ValueError."""
    for record, _ in read_records(path):
        if record.WhichOneof("record_type") == "history":
            yield _put({}, record.history.item)


def read_records(source: bytes | Path, *, start: int = 0) -> Iterator[tuple[Any, int]]:
    """
    Yield the whole records of a file, or of its content, in their order, each with the number of bytes up to its end.

    `start` is such a number: those behind it. Of a file it holds a record at a time. A torn record at the end, which a
    kill leaves, is left out. Raises ValueError for another kind of file, and UnknownFormError for one of a version that
    is not known.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        _check_header(file.read(HEADER_BYTES))
        yield from _read_records(file, max(start, HEADER_BYTES))


def _read_records(file: BinaryIO, position: int) -> Iterator[tuple[Any, int]]:
    file.seek(position)
    body = b""
    while True:
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < CHUNK_HEADER.size:
            position += left
            file.seek(left, os.SEEK_CUR)
            continue
        head = file.read(CHUNK_HEADER.size)
        if len(head) < CHUNK_HEADER.size:
            return
        checksum, size, kind = CHUNK_HEADER.unpack(head)
        if kind == size == 0:  # the rest of a block
            position += left
            file.seek(left - len(head), os.SEEK_CUR)
            continue
        position += CHUNK_HEADER.size
        chunk = file.read(size)
        if zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            return
        position += size
        body = chunk if kind in (WHOLE, FIRST) else body + chunk
        if kind in (WHOLE, LAST):
            yield _parsed(body), position


def _check_header(header: bytes) -> None:
    if header and header[: len(MAGIC)] != MAGIC:
        raise ValueError("it is no .wandb file")
    mark, version = header[len(MAGIC) : HEADER_BYTES - 1], header[HEADER_BYTES - 1 : HEADER_BYTES]
    if mark == MARK and version not in (b"", bytes([FORMAT])):
        raise UnknownFormError(f"its format is {version[0]}; known is that of wandb {WRITER}, {FORMAT}")


def _parsed(body: bytes) -> Any:
    """Return a record. Raises UnknownFormError for what is none, and where the file is for newer readers."""
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    try:
        record.ParseFromString(body)
    except Exception as error:  # protobuf's own type
        raise UnknownFormError(f"a record in it is none of wandb {WRITER}'s: {error}") from error
    if record.WhichOneof("record_type") == "header":
        made, needed = record.header.version_info.producer, record.header.version_info.min_consumer
        numbers = [int(part) for part in needed.split(".") if part.isdecimal() and len(part) < 10]
        if tuple(numbers) > READER:
            raise UnknownFormError(
                f"wandb {made:.40} wrote it for readers from {needed:.20} on; known are files of wandb {WRITER}"
            )
    return record


def _has_unknown(record: Any) -> bool:
    """Whether a record without a kind has one of a newer version."""
    known = type(record)()
    known.CopyFrom(record)
    known.DiscardUnknownFields()
    return bool(known.ByteSize() != record.ByteSize())


def encode(bodies: Iterable[bytes], *, start: int = HEADER_BYTES) -> bytes:
    """Return serialized records as they stand behind the first `start` bytes of a file."""
    data = bytearray()
    for body in bodies:
        kind, rest = FIRST, body
        while True:
            left = BLOCK_BYTES - (start + len(data)) % BLOCK_BYTES
            if left < CHUNK_HEADER.size:  # nothing begins there
                data += bytes(left)
                left = BLOCK_BYTES
            chunk, rest = rest[: left - CHUNK_HEADER.size], rest[left - CHUNK_HEADER.size :]
            if not rest:
                kind = WHOLE if kind == FIRST else LAST
            data += CHUNK_HEADER.pack(zlib.crc32(chunk, zlib.crc32(bytes([kind]))), len(chunk), kind) + chunk
            if not rest:
                break
            kind = MIDDLE
    return bytes(data)


def seal_all(folders: Iterable[Path], run_id: str) -> dict[Path, int]:
    """
    Make each offline run folder fit to be synced; returns the number of steps in each, the oldest first.

    `wandb sync` stops, and says nothing, at a file whose tail is torn, and refuses one that names no run or whose
    beginning is lost: the first kind is sealed, the others are renamed. The rows that are counted are on the disk
    itself. No attempt may be running.
    """
    found = []
    for folder in folders:
        path = folder / f"run-{run_id}.wandb"
        try:
            if (sealed := seal(path)) is None:
                folder.rename(folder.with_name(f"{TORN}{folder.name}"))
            else:
                found.append((*sealed, folder))
        except (OSError, UnknownFormError) as error:
            logger.warning("%s can't be read, its rows are not counted: %s", path, error)
    return {folder: steps for _, steps, folder in sorted(found, key=lambda each: each[0])}


def seal(path: Path) -> tuple[int, int] | None:
    """
    Cut a file behind its last whole record, and add the record of an end with exit code 1 if it has none.

    Returns when the attempt began, in nanoseconds since 1970, and how many steps it has: a row is one, and where the
    user gives steps of his own, those he skips too. None, and nothing is changed, if nothing in the file says whose it
    is. Raises OSError, and UnknownFormError, where nothing is changed either.
    """
    from wandb.proto import wandb_internal_pb2

    started_at: int | None = None
    rows, num_records, has_ended, end, newest = 0, 0, False, HEADER_BYTES, None
    try:
        for record, end in read_records(path):  # noqa: B007 - the last end is used below
            kind = record.WhichOneof("record_type")
            num_records += 1
            if kind == "history":
                rows, newest = rows + 1, record.history
            has_ended |= kind == "exit"
            if kind == "run" and started_at is None:
                started_at = record.run.start_time.ToNanoseconds()
    except UnknownFormError:
        raise
    except ValueError:
        return None
    if started_at is None:
        return None
    with path.open("r+b") as file:
        file.truncate(end)
        if not has_ended:
            record = wandb_internal_pb2.Record(num=num_records + 1)
            record.exit.exit_code = 1
            file.seek(end)
            file.write(encode([record.SerializeToString()], start=end))
        file.flush()
        os.fsync(file.fileno())
    last = -1 if newest is None else _put({}, newest.item).get("_step", -1)
    return started_at, max(rows, last + 1 if isinstance(last, int) else 0)


def mark_synced(folders: Iterable[Path], run_id: str) -> None:
    """Tell `wandb sync` that the rows of these folders have been sent."""
    for folder in folders:
        try:
            (folder / f"run-{run_id}.wandb.synced").touch()
        except OSError as error:
            logger.debug("%s could not be marked as synced: %s", folder, error)


def _put(values: dict[str, Any], items: Iterable[Any]) -> dict[str, Any]:
    """Put the items into the values, each at its nested key; returns the values. Raises UnknownFormError."""
    for item in items:
        place = values
        *folders, name = _key(item)
        for folder in folders:
            if not isinstance(place.get(folder), dict):
                place[folder] = {}
            place = place[folder]
        place[name] = _value(item)
    return values


def _value(item: Any) -> Any:
    """Return the value of a row or a summary, which wandb 0.31 writes as JSON, and if it is told to typed as well."""
    if item.value_json:
        try:
            return load_json(item.value_json.encode())
        except ValueError as error:
            raise UnknownFormError(f"{'.'.join(_key(item)):.60} in it can't be read: {error}") from error
    kind = item.WhichOneof("value") if "value" in item.DESCRIPTOR.oneofs_by_name else None
    if kind is None:
        raise UnknownFormError(
            f"{'.'.join(_key(item)):.60} in it has a value of a form that wandb {WRITER} does not have "
            "(x_history_value_encoding)"
        )
    if kind == "none":
        return None
    return load_json(item.json.encode()) if kind == "json" else getattr(item, kind)


def _key(item: Any) -> list[str]:
    key = list(item.nested_key) or [item.key]
    if len(key) > DEEPEST:
        raise UnknownFormError(f"{key[0]:.60} in it is nested too deep")
    return key


def _remove(values: dict[str, Any], items: Iterable[Any]) -> None:
    for item in items:
        place: Any = values
        *folders, name = _key(item)
        for folder in folders:
            place = place.get(folder) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(name, None)
