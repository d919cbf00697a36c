"""
Files that are whole or absent, their digests, and reading torch's files without running what is in them.

What a kill of the process must not tear is written beside and renamed. What must outlive a loss of power too is synced
before the rename (`durable`): that costs a wait for the disk, so only what a later attempt goes on from has it: the
checkpoints, the rows up to them, which W&B run it is, and artifacts that are deleted elsewhere once they are staged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

CHUNK_BYTES = 1 << 20


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk itself. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(path: Path, *, durable: bool = False, suffix: str = "partial") -> Iterator[Path]:
    """
    A path beside `path` to write a file to; it takes the place of `path` at the end, unless the block raises.

    Two processes that may write at once need a `suffix` each.
    """
    partial = path.with_name(f"{path.name}.{suffix}")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str, *, durable: bool = False, suffix: str = "partial") -> None:
    """Write a text in place of what is there, whole or not at all. Raises OSError."""
    with written_whole(path, durable=durable, suffix=suffix) as partial:
        partial.write_text(text, encoding="utf-8")


def put_in_place(partial: Path, final: Path) -> None:
    """Rename a folder whose files are synced to what it is called from then on; an older one of that name goes then."""
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():  # a run that was resumed before this step writes it again
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as the Trainer writes it: two spaces, sorted keys, a newline at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def update_json(path: Path, content: dict[str, Any]) -> None:
    """Add to a JSON object on disk, or write it: Trainer.save_metrics with `combined`."""
    present = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, present | content)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def load_safely(path: str | Path, map_location: Any, allowed: Sequence[Any], *, mmap: bool = False) -> Any:
    """
    Local: tensors, plain values and objects of the `allowed` classes; with `mmap` tensors are read when they are used.

    Raises ConfigError if the file holds anything else or can't be read.
    """
    import torch

    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises several types for a file that is cut, damaged or crafted
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} can't be loaded safely: {reason}") from error
