"""What a row is: its names, its values in JSON, and its line in `metrics.jsonl` on this disk, readable by pandas."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.config import plain
from harness.files import written_whole

logger = logging.getLogger(__name__)

JOURNAL_FILE = "metrics.jsonl"
# Columns of ours: the row's number in the training, its step in W&B, seconds since 1970.
COLUMNS = ("_row", "_step", "_timestamp")
# They describe the whole run: the Trainer puts them into the summary, under these names, not into a row.
SUMMARY_ONLY = (
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "total_flos",
)


class Journal:
    """
    The file, to read, to cut and to append to. A torn last line, which a kill leaves, is no row.

    A disk that fails is a warning, since it should not end a training. Lines that could not be written are tried again
    with the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._size = 0
        self._unwritten = b""
        self._has_warned = False

    def lines(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield each whole line, the oldest first, and the number of bytes up to its end."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            end = 0
            for raw in file:
                end += len(raw)
                if not raw.endswith(b"\n"):
                    return
                try:
                    line = json.loads(raw)
                except ValueError:  # the disk's: ours end in a newline only when they are whole
                    continue
                if isinstance(line, dict) and all(name in line for name in COLUMNS):
                    yield line, end

    def begin(self, size: int) -> None:
        """
        Keep the first `size` bytes and go on behind them, in a file of this attempt's own.

        A process that was fenced off and has not noticed it yet writes to the old file, which nobody reads any more.
        """
        self._size = size
        self._open()

    def _open(self) -> None:
        try:
            with written_whole(self.path, durable=True) as partial:
                if self._size:
                    shutil.copyfile(self.path, partial)
                descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
                os.ftruncate(descriptor, self._size)
            self._descriptor = descriptor
        except OSError as error:
            self._warn(error)

    def append(self, row: int, step: int, timestamp: float, values: Mapping[str, Any]) -> None:
        """Write a line of values as `encoded` gives them. A kill of this process afterwards does not lose it."""
        line = dict(zip(COLUMNS, (row, step, timestamp), strict=True)) | dict(values)
        self._unwritten += json.dumps(line).encode() + b"\n"
        if self._descriptor is None:
            self._open()
        if self._descriptor is None:
            return
        try:
            while self._unwritten:
                written = os.pwrite(self._descriptor, self._unwritten, self._size)
                self._size += written
                self._unwritten = self._unwritten[written:]
        except OSError as error:
            self._warn(error)

    def sync(self) -> None:
        """Sync the file to the disk, so that the rows that a checkpoint counts survive a loss of power."""
        if self._descriptor is not None:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self._warn(error)

    def copier(self) -> Callable[[Path], None]:
        """Return what copies the rows until now to a path, in any thread, without histograms and tables."""
        size = self._size

        def copy(path: Path) -> None:
            with self.path.open("rb") as source, path.open("wb") as target:
                while source.tell() < size and (raw := source.readline()):
                    if b'"_type"' in raw:
                        line = json.loads(raw)
                        kept = {name: value for name, value in line.items() if not isinstance(value, dict)}
                        raw = json.dumps(kept).encode() + b"\n"
                    target.write(raw)

        return copy

    def close(self) -> None:
        """Close the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            logger.warning("%s can't be written, the training goes on: %s", self.path, error)
        self._has_warned = True


def rewrite(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    The Trainer's names as its reports show them: `eval_loss` is `eval/loss`, `loss` is `train/loss`.

    Names with a slash are the user's own and stay, as do the five of the summary: twice changes nothing.
    """
    return {_rewritten(name): value for name, value in values.items()}


def _rewritten(name: str) -> str:
    for prefix in ("eval", "test"):
        if name.startswith(f"{prefix}_"):
            return f"{prefix}/{name[len(prefix) + 1 :]}"
    return name if "/" in name or name in SUMMARY_ONLY else f"train/{name}"


def encoded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row in JSON types: histograms as W&B writes them, tables and charts as what they are made of."""
    values: dict[str, Any] = json.loads(json.dumps({name: _encoded(value) for name, value in row.items()}))
    return values


def _encoded(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    import wandb
    from wandb.plot import CustomChart

    if isinstance(value, wandb.Histogram):
        return {"_type": "histogram", "values": list(value.histogram), "bins": list(value.bins)}
    if isinstance(value, wandb.Table):
        return {"_type": "table", "columns": plain(value.columns), "data": plain(value.data)}
    if isinstance(value, CustomChart):
        spec = value.spec
        made_of = {"spec_name": spec.spec_name, "fields": spec.fields, "string_fields": spec.string_fields}
        return {"_type": "chart", **plain(made_of), "split_table": spec.split_table, "table": _encoded(value.table)}
    if callable(getattr(value, "item", None)):
        with suppress(ValueError, RuntimeError):  # more than one number
            return value.item()
    return plain(value)


def decoded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `encoded` has written as `run.log` takes it, without our own columns."""
    return {name: _decoded(value) for name, value in values.items() if name not in COLUMNS}


def _decoded(value: Any) -> Any:
    kind = value.get("_type") if isinstance(value, dict) else None
    if kind is None:
        return value
    import numpy as np
    import wandb

    if kind == "histogram":
        return wandb.Histogram(np_histogram=(np.asarray(value["values"]), np.asarray(value["bins"])))
    if kind == "table":
        return wandb.Table(columns=value["columns"], data=value["data"])
    if kind == "chart":
        return wandb.plot_table(
            value["spec_name"],
            _decoded(value["table"]),
            value["fields"],
            value["string_fields"],
            split_table=value["split_table"],
        )
    return value
