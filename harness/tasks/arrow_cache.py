"""Rows of text files as files of Arrow, made once and then found."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from harness.files import written_whole
from harness.tasks.flags import TaskConfig

logger = logging.getLogger(__name__)

# A schema, and the tables that follow it.
Content = tuple[pa.Schema, Iterator[pa.Table]]


def cache_folder(config: TaskConfig) -> Path:
    """Return the folder of what is kept beside the caches of `datasets`."""
    return Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "harness"


def cached_rows(form: str, key: str, config: TaskConfig, read: Callable[[], Content]) -> Any:
    """Return the rows of a `form` of files as a data set on disk; `read` makes them where there are none of the key."""
    cached = cache_folder(config) / f"{form}-{hashlib.sha256(key.encode()).hexdigest()[:16]}" / "rows.arrow"
    if not cached.is_file() or config.overwrite_cache:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Written once: what `datasets` prepares is found again by the file's time.
        with one_at_a_time(cached.with_suffix(".lock")) as is_alone:
            for left in cached.parent.glob(f"{cached.name}.*.partial") if is_alone else ():
                left.unlink(missing_ok=True)  # of a process that was killed
            if not cached.is_file() or config.overwrite_cache:
                _write(cached, *read())
    return datasets.Dataset.from_file(str(cached))


def _write(cached: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    suffix = f"{os.getpid()}.partial"  # where files can't be locked another process may write at the same time
    with (
        written_whole(cached, suffix=suffix) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for table in tables:
            writer.write_table(table)


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[bool]:
    """
    Wait while another process, on any node that shares the cache, makes the same; yield whether that is sure.

    A process that dies releases the lock. Without file locks, or where none can be written, each makes its own.
    """
    try:
        file = lock.open("a")
    except OSError:
        yield False
        return
    is_alone = True
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process prepares the same data (%s): waiting for it.", file.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            is_alone = False
            logger.info("%s can't be locked: each process prepares the data.", file.name)
        yield is_alone
