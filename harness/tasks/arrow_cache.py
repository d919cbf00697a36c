"""Rows of text files as files of Arrow, made once and then found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from harness.files import written_whole
from harness.tasks.flags import TaskConfig

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
        schema, tables = read()
        suffix = f"{os.getpid()}.partial"  # another process may make it at the same time
        with (
            written_whole(cached, suffix=suffix) as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
        ):
            for table in tables:
                writer.write_table(table)
    return datasets.Dataset.from_file(str(cached))
