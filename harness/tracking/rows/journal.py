"""What a row is: its names, its values in JSON, and its line in `metrics.jsonl` on this disk, readable by pandas."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.config import plain
from harness.files import written_whole
from harness.tracking.client import one_line
from harness.tracking.damage import MOST_BYTES, is_count, is_number, load_json

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
        self._has_warned = self._has_told = False

    @property
    def size(self) -> int:
        """The bytes of the file of this attempt."""
        return self._size

    def lines(self, start: int = 0, stop: int | None = None) -> Generator[tuple[dict[str, Any], int], None, None]:
        """
        Yield each whole line from one byte to another, the oldest first, and the number of bytes up to its end.

        What the disk has damaged is passed over, and told.
        """
        end, raw_lines = start, self._raw_lines(start)
        while (stop is None or end < stop) and (found := next(raw_lines, None)) is not None:
            raw, size = found
            end += size
            if not raw.endswith(b"\n"):
                return
            try:
                yield parse_line(raw), end
            except ValueError as error:  # ours end in a newline only when they are whole
                place = f"the line at byte {end - size}"
                self._tell(f"{place} is damaged ({one_line(error)}), and others may be: they are no rows")

    def _raw_lines(self, start: int = 0) -> Iterator[tuple[bytes, int]]:
        """Yield each line with the bytes it has in the file; one that is too long to be a row only with its end."""
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                while raw := file.readline(MOST_BYTES):
                    size, end = len(raw), raw[-1:]
                    while end != b"\n" and (more := file.readline(MOST_BYTES)):
                        raw, size, end = b"", size + len(more), more[-1:]
                    yield raw or end, size
        except FileNotFoundError:
            return
        except OSError as error:
            self._tell(f"it can't be read, its rows are not known here: {error}")

    def _tell(self, what: str) -> None:
        if not self._has_told:
            logger.warning("%s: %s. The training goes on; what W&B has stays there.", self.path, what)
        self._has_told = True

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
            with path.open("wb") as target:
                left = size
                for raw, length in self._raw_lines():
                    if (left := left - length) < 0:
                        break
                    target.write(self._without_media(raw))

        return copy

    def _without_media(self, raw: bytes) -> bytes:
        """A line without histograms and tables; nothing of one that is damaged where they are."""
        if b'"_type"' not in raw:
            return raw
        try:
            line = parse_line(raw)
        except ValueError as error:
            self._tell(f"a line is damaged ({one_line(error)}): checkpoints are without it")
            return b""
        kept = {name: value for name, value in line.items() if not isinstance(value, dict)}
        return json.dumps(kept).encode() + b"\n"

    def close(self) -> None:
        """Close the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            logger.warning("%s can't be written, the training goes on: %s", self.path, error)
        self._has_warned = True


def parse_line(raw: bytes) -> dict[str, Any]:
    """Return what a line of the file holds. Raises ValueError if that is no row."""
    line = load_json(raw)
    if not isinstance(line, dict) or not (is_count(line.get("_row")) and is_count(line.get("_step"))):
        raise ValueError("it has no number of a row or of a step")
    if not is_number(line.get("_timestamp")):
        raise ValueError("it has no time")
    return line


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
    """Return what `encoded` has written as `run.log` takes it, without our own columns; what is damaged is left out."""
    row = {}
    for name, value in values.items():
        if name in COLUMNS:
            continue
        try:
            row[name] = _decoded(value)
        except Exception as error:  # numpy's and wandb's, for values of other types than were written
            logger.warning("%s in a row that was recorded is damaged and left out: %s", name, one_line(error))
    return row


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


class RowCount:
    """Counts the rows of a journal from a row and a step on; each time it reads what was written since the last."""

    def __init__(self, journal: Journal, *, first_row: int, first_step: int) -> None:
        self.journal, self.first_row, self.first_step = journal, first_row, first_step
        self._count = 0
        self._last: tuple[int, int, Any] = (0, 0, None)  # where the last line begins and ends, and which it is

    def read(self) -> int:
        """Return how many rows there are by now."""
        start, end, columns = self._last
        if columns is not None and [_columns(line) for line, _ in self.journal.lines(start, end)] != [columns]:
            self._count, self._last = 0, (0, 0, None)  # another attempt has cut it
        for line, end in self.journal.lines(self._last[1]):
            self._count += line["_row"] >= self.first_row and line["_step"] >= self.first_step
            self._last = (self._last[1], end, _columns(line))
        return self._count


def _columns(line: Mapping[str, Any]) -> list[Any]:
    return [line[name] for name in COLUMNS]
