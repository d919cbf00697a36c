"""
Write files so that they are whole or absent, compute their digests, and read torch's files without running code.

A file that a kill of the process must not leave half-written is written beside its place and renamed. One that must
survive a power loss too is synced before the rename (`durable`). A sync waits for the disk, so it is only used for what
a later attempt resumes from: the checkpoints, the rows up to them, the identity of the W&B run, and staged artifacts
whose originals are deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

CHUNK_BYTES = 1 << 20


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(path: Path, *, durable: bool = False, suffix: str = "partial") -> Iterator[Path]:
    """
    Yield a path beside `path` to write to; at the end of the block it replaces `path`, unless the block raises.

    Two processes that may write at once need a different `suffix` each.
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
    """Write a text to a file, whole or not at all, replacing an older one. Raises OSError."""
    with written_whole(path, durable=durable, suffix=suffix) as partial:
        partial.write_text(text, encoding="utf-8")


def follow_umask(folder: Path) -> None:
    """
    Give each file below a folder the mode of a new file there: safetensors writes for its user alone. Raises OSError.

    The umask can be read by setting it only, which other threads would see; a new file shows it, and what the folder's
    access list adds to it.
    """
    probe = folder / "mode.partial"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def put_in_place(partial: Path, final: Path) -> None:
    """Rename a folder whose files are synced to its final name; an older folder of that name is deleted."""
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():  # a run that was resumed from an earlier step writes this one again
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # the new one is there, whatever is left of the older


def write_json(path: Path, content: Any) -> None:
    """Write JSON as the Trainer writes it: two spaces, sorted keys, a newline at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def update_json(path: Path, content: dict[str, Any]) -> None:
    """Add keys to a JSON object on disk, or create it, as Trainer.save_metrics does with `combined`."""
    present = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, present | content)


def digest_of(path: Path, *, between: Callable[[], object] | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; `between` two chunks something is called, a rest say."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if between is not None:
                between()
    return digest.hexdigest()


def load_safely(path: str | Path, map_location: Any, allowed: Sequence[Any], *, mmap: bool = False) -> Any:
    """
    Local: load tensors, plain values and objects of the `allowed` classes; with `mmap` tensors are read on use.

    A file that can't be mapped (torch's older format, some file systems) is read. Raises ConfigError if the file holds
    anything else or can't be read.
    """
    import torch

    try:
        with torch.serialization.safe_globals(list(allowed)):
            try:
                return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
            except RuntimeError:
                if not mmap:
                    raise
                return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises several types for a file that is cut, damaged or crafted
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} can't be loaded safely: {reason}") from error
