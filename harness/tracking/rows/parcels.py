"""
What of an offline run `wandb sync` brings to the server: everything but rows and staged artifacts.

It would send all rows of a file again if it were killed in between, and stops at a file that a kill has torn. So it
gets a whole file of our own, without rows; those go by their numbers (`rows.deliver_rows`), and twice changes nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.errors import ParcelError
from harness.tracking.artifacts.staging import FOLDER
from harness.tracking.rows.wandb_file import (
    BLOCK_BYTES,
    CHUNK_HEADER,
    FIRST,
    HEADER_BYTES,
    LAST,
    MIDDLE,
    WHOLE,
    read_records,
)

# What makes the run and its charts; the rest of a life waits for its end.
SETUP = ("header", "run", "config", "environment", "telemetry", "metric")
SYNC_TIMEOUT_SECONDS = 3600.0


def send(path: Path, *, is_over: bool, resumes: bool, lock: int | None) -> list[Any]:
    """
    Bring a .wandb file to the server without its rows; of a life that is not over only what makes the run.

    `resumes`: behind what W&B has of the run, else in place of it. The descriptor `lock` is held by `wandb sync` too:
    it may outlive us. Returns the artifact records that were sent. Raises ParcelError, OSError and ValueError.
    """
    data = path.read_bytes()
    records = list(_chosen(data, is_over=is_over, resumes=resumes))
    with tempfile.TemporaryDirectory(prefix="harness-sync-") as temporary:
        folder = Path(temporary) / path.parent.name
        folder.mkdir()
        (folder / "files").symlink_to((path.parent / "files").absolute())
        (folder / path.name).write_bytes(encode(data[:HEADER_BYTES], [each.SerializeToString() for each in records]))
        _wandb_sync(folder, lock)
    return [each.artifact for each in records if each.WhichOneof("record_type") == "artifact"]


def encode(header: bytes, bodies: list[bytes]) -> bytes:
    """Records in LevelDB's log format: what `read_records` reads."""
    data = bytearray(header)
    for body in bodies:
        kind = FIRST
        while True:
            left = BLOCK_BYTES - len(data) % BLOCK_BYTES
            if left < CHUNK_HEADER.size:
                data += bytes(left)
                left = BLOCK_BYTES
            chunk, body = body[: left - CHUNK_HEADER.size], body[left - CHUNK_HEADER.size :]
            if not body:
                kind = WHOLE if kind == FIRST else LAST
            data += CHUNK_HEADER.pack(zlib.crc32(chunk, zlib.crc32(bytes([kind]))), len(chunk), kind) + chunk
            if not body:
                break
            kind = MIDDLE
    return bytes(data)


def _chosen(data: bytes, *, is_over: bool, resumes: bool) -> Iterator[Any]:
    for record, _ in read_records(data):
        kind = record.WhichOneof("record_type")
        if kind == "history" or (not is_over and kind not in SETUP):
            continue
        if kind == "artifact" and _is_staged(record.artifact):
            continue
        if kind == "run":
            record.run.resume = resumes
        yield record


def _is_staged(artifact: Any) -> bool:
    """Whether its files are those of a staged artifact, which goes by itself and is verified."""
    places = [entry.local_path for entry in artifact.manifest.contents if entry.local_path]
    return bool(places) and all(FOLDER in Path(place).parts for place in places)


def _wandb_sync(folder: Path, lock: int | None) -> None:
    # WANDB_MODE=offline in a shell is meant for trainings.
    variables = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_RUN_ID")}
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    try:
        done = subprocess.run(  # noqa: S603 - ourselves
            command,
            env=variables | {"WANDB_SILENT": "false"},
            cwd=folder.parent,  # it leaves logs where it is started
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SYNC_TIMEOUT_SECONDS,
            check=False,
            pass_fds=() if lock is None else (lock,),
        )
    except subprocess.TimeoutExpired as error:
        raise ParcelError(f"`wandb sync` did not end within {SYNC_TIMEOUT_SECONDS:g} s") from error
    said = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line or "rror:" in line]
    if done.returncode != 0 or said:
        raise ParcelError(f"`wandb sync` failed: {' '.join(said)[-300:] or f'exit code {done.returncode}'}")
