"""
Read csv and tsv files: each cell is the text that stands there, each row has the header's number of cells.

Nothing is guessed from the content: `NA`, `null`, `007` and `true` are these texts. Only an empty cell is None.
"""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import logging
import lzma
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
from datasets.iterable_dataset import ArrowExamplesIterable

from harness.errors import ConfigError
from harness.tasks.arrow_cache import Content, cached_rows
from harness.tasks.files import DataFile
from harness.tasks.flags import TaskConfig

logger = logging.getLogger(__name__)

VERSION = 1  # of what is cached; another number reads the files anew
BATCH_ROWS = 1000  # what is in memory at once
NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
WHOLE_NUMBER = re.compile(r"\s*[+-]?[0-9]+\s*")

Rows = list[tuple[int, list[str]]]  # each with the number of its first line


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How cells are divided, and whether the first row names the columns; None: by the kind of file."""

    delimiter: str | None
    quoting: str | None
    has_header: bool

    @classmethod
    def of(cls, config: TaskConfig) -> Dialect:
        """Return what the flags say."""
        delimiter = config.csv_delimiter
        names = {"tab": "\t", "\\t": "\t"}
        return cls(
            delimiter=None if delimiter is None else names.get(delimiter, delimiter),
            quoting=config.csv_quoting,
            has_header=config.csv_header,
        )

    def reader(self, file: DataFile, lines: Iterable[str]) -> Any:
        """Return Python's reader of the lines."""
        is_tsv = file.suffix == ".tsv"
        return csv.reader(
            lines,
            delimiter=self.delimiter or ("\t" if is_tsv else ","),
            quoting=csv.QUOTE_MINIMAL if self.reads_quotes(file) else csv.QUOTE_NONE,
            strict=True,  # a quote that nothing closes is an error, not a cell with all the lines below it
        )

    def reads_quotes(self, file: DataFile) -> bool:
        """Whether quotes may enclose a cell: in a tsv they are text unless --csv_quoting says otherwise."""
        return (self.quoting or ("none" if file.suffix == ".tsv" else "minimal")) == "minimal"


def load(files: Sequence[DataFile], config: TaskConfig) -> Any:
    """
    Return the rows of csv and tsv files as a data set of `datasets`: on disk, or with --streaming read when needed.

    Raises ConfigError, which names file and line, for rows that have not as many cells as the header.
    """
    dialect = Dialect.of(config)
    if not config.streaming:
        stamps = [file.stamp for file in files]
        key = json.dumps([VERSION, dialect.delimiter, dialect.quoting, dialect.has_header, stamps])
        return cached_rows("csv", key, config, lambda: _content(files, dialect))
    columns = _columns(files[0], dialect)
    features = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
    # A list among the arguments is divided among workers and ranks.
    shards = ArrowExamplesIterable(_tables, {"files": list(files), "dialect": dialect, "columns": tuple(columns)})
    return datasets.IterableDataset(shards, info=datasets.DatasetInfo(features=features))


def _content(files: Sequence[DataFile], dialect: Dialect) -> Content:
    columns = _columns(files[0], dialect)
    return pa.schema({name: pa.string() for name in columns}), (table for _, table in _tables(files, dialect, columns))


def is_number(value: Any) -> bool:
    """Whether a cell is written as a number; what Python alone would take, `nan` or `1_000`, is none."""
    return NUMBER.fullmatch(value) is not None


def is_whole(value: str) -> bool:
    """Whether a cell is written as a whole number."""
    return WHOLE_NUMBER.fullmatch(value) is not None


@contextmanager
def opened(file: DataFile) -> Iterator[IO[bytes]]:
    """Open a file that may be compressed, as bytes. Raises ConfigError where pyarrow lacks zstd."""
    with file.path.open("rb") as raw:
        yield decompressed(raw, file.compression)


def decompressed(raw: IO[bytes], compression: str | None) -> IO[bytes]:
    """Return the content of an open file, all of its frames."""
    if compression is None:
        return raw
    if compression == "zstd":
        require_zstd()
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    module: Any = {"gzip": gzip, "bz2": bz2, "xz": lzma}[compression]
    content: IO[bytes] = module.open(raw)
    return content


def require_zstd() -> None:
    """Raise ConfigError if this pyarrow can't read zstd."""
    if not pa.Codec.is_available("zstd"):
        raise ConfigError(
            "A file .zst needs a pyarrow that was built with zstd, as those of PyPI and conda are; install one, or "
            "unpack the file (`unzstd`)."
        )


def _columns(file: DataFile, dialect: Dialect) -> tuple[str, ...]:
    """Return the names of the columns; a column whose name is missing is named by its number. Raises ConfigError."""
    first = next((rows[0][1] for rows in _batches(file, dialect) if rows), None)
    if first is None:
        raise ConfigError(f"{file.path} is empty; give a file with at least one row.")
    other = re.search(r"[;\t|,]", first[0]) if dialect.has_header and dialect.delimiter is None else None
    if len(first) == 1 and other is not None:
        shown = "tab" if other.group() == "\t" else other.group()
        raise ConfigError(
            f"{file.path} has one column, {first[0]!r}; are cells divided by another character? Give "
            f"--csv_delimiter '{shown}', or rename the column."
        )
    names = [name if dialect.has_header and name else f"column{at}" for at, name in enumerate(first, start=1)]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{file.path} has several columns {repeated!r}; give each a name of its own.")
    return tuple(names)


def _tables(
    files: Sequence[DataFile], dialect: Dialect, columns: Sequence[str]
) -> Iterator[tuple[tuple[int, int], pa.Table]]:
    """Yield the rows of the files, a thousand at a time, each with a key of its own."""
    for at, file in enumerate(files):
        own = _columns(file, dialect)
        if sorted(own) != sorted(columns):
            raise ConfigError(
                f"{file.path} has the columns {', '.join(own)}, the first file {', '.join(columns)}; give files with "
                "the same columns."
            )
        is_header = dialect.has_header
        for number, batch in enumerate(_batches(file, dialect)):
            _check_width(file, batch, len(own))
            _look_for_quotes(file, batch, dialect)
            rows = [row for _, row in batch][is_header and bool(batch) :]
            is_header = is_header and not batch
            if rows:
                cells = zip(*rows, strict=True)
                arrays = [pa.array([cell or None for cell in column], pa.string()) for column in cells]
                yield (at, number), pa.table(dict(zip(own, arrays, strict=True))).select(list(columns))


def _check_width(file: DataFile, rows: Rows, width: int) -> None:
    """Raise ConfigError for a row that has not as many cells as the first."""
    if wrong := next(((line, len(row)) for line, row in rows if len(row) != width), None):
        line, cells = wrong
        raise ConfigError(
            f"{file.path}, line {line}: {cells} cells where the first row has {width}; correct the row (a cell with "
            "the delimiter in it stands in quotes), or give --csv_delimiter or --csv_quoting."
        )


def _look_for_quotes(file: DataFile, rows: Rows, dialect: Dialect) -> None:
    """Warn of cells that look as if their quotes were not meant as text, where nothing says that they are."""
    is_open = dialect.quoting is None and not dialect.reads_quotes(file)
    if is_open and any(len(cell) > 1 and cell[0] == cell[-1] == '"' for _, row in rows for cell in row):
        _warn_of_quotes(file.path)


@functools.cache  # once a file, though a stream is begun several times
def _warn_of_quotes(path: Path) -> None:
    logger.warning(
        "%s: the quotes around some cells are taken as text, as is usual in tsv; where they are not text, give "
        "--csv_quoting minimal.",
        path,
    )


def _batches(file: DataFile, dialect: Dialect) -> Iterator[Rows]:
    """Yield a thousand rows at a time, blank ones left out, each with its first line's number. Raises ConfigError."""
    with opened(file) as content:
        reader = dialect.reader(file, io.TextIOWrapper(content, encoding="utf-8-sig", newline=""))
        line = 1
        try:
            while True:
                rows: Rows = []
                before = csv.field_size_limit(sys.maxsize)  # for all of Python it is 128 KiB
                try:
                    for row in islice(reader, BATCH_ROWS):
                        rows.append((line, row))
                        line = reader.line_num + 1
                finally:
                    csv.field_size_limit(before)
                if not rows:
                    return
                yield [each for each in rows if each[1]]
        except csv.Error as error:
            raise ConfigError(
                f"{file.path}, line {line}, can't be read: {error}; write a cell with quotes in it as "
                '"like ""this""", or give --csv_quoting none, which takes quotes as text.'
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file.path} is not UTF-8 after line {line}: {error}; convert it.") from error
        except (EOFError, OSError, lzma.LZMAError) as error:
            raise ConfigError(f"{file.path} can't be read after line {line}: {error}.") from error


def cells_of(rows: Any, column: str, *, of_stream: int = 1000) -> Iterator[str]:
    """Yield the cells of a column that are not empty; of a stream those of its first rows."""
    if isinstance(rows, datasets.IterableDataset):
        rows = rows.take(of_stream)
    batches = rows.select_columns([column]).iter(batch_size=1000)
    return (cell for cell in chain.from_iterable(batch[column] for batch in batches) if cell)
