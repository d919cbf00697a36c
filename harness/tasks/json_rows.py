"""
Read json and jsonl files: each value is what stands there, each column has one type over all files.

`datasets` would find the types block by block and file by file, and take texts that look like dates for times.
"""

from __future__ import annotations

import io
import json
import logging
import lzma
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import reduce
from itertools import chain, islice
from typing import IO, Any

import datasets
import pyarrow as pa
from datasets.iterable_dataset import ArrowExamplesIterable

from harness.errors import ConfigError
from harness.tasks.arrow_cache import Content, cached_rows
from harness.tasks.delimited import opened
from harness.tasks.files import DataFile
from harness.tasks.flags import TaskConfig

logger = logging.getLogger(__name__)

VERSION = 1  # of what is cached; another number reads the files anew
BATCH_ROWS = 1000  # what is in memory at once
SPACE = re.compile(r"\s*")
# The kind of a value: one of these, ("list", kind), or ("struct", ((name, kind), ...)). `mixed` are single values of
# several kinds, which become the texts that stand in the file; `json` are values of which some are lists or objects.
SINGLE = {
    "null": pa.null(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "text": pa.string(),
    "mixed": pa.string(),
    "json": pa.json_(),
}
OF_TYPES = {type(None): "null", bool: "bool", float: "float", str: "text"}
SHOWN = {
    "null": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "text": "a text",
    "mixed": "a text",
    "json": "any value",
    "list": "lists of another kind",
    "struct": "other objects",
}
Kind = Any
Row = tuple[str, dict[str, Any]]  # with its place, for messages


class Written(float):
    """A number with a fraction or an exponent, and how it is written."""

    text: str


class DiffersError(Exception):
    """A column can't have both kinds."""


def load(files: Sequence[DataFile], config: TaskConfig) -> Any:
    """
    Return the rows of json files as a data set of `datasets`: on disk, or with --streaming read when needed.

    A file has an object a line, objects one after the other, or a list of objects or of texts. Raises ConfigError,
    which names file, line and column.
    """
    if not config.streaming:
        key = json.dumps([VERSION, [file.stamp for file in files]])
        return cached_rows("json", key, config, lambda: _content(files))
    # A column that is empty so far may well hold texts.
    first = _kinds_of(files[:1], batches=1)
    kinds = {name: "text" if kind == "null" else kind for name, kind in first.items()}
    _require_rows(kinds, files)
    # A list among the arguments is divided among workers and ranks.
    shards = ArrowExamplesIterable(_tables, {"files": list(files), "kinds": kinds})
    features = datasets.Features.from_arrow_schema(_schema(kinds))
    return datasets.IterableDataset(shards, info=datasets.DatasetInfo(features=features))


def _content(files: Sequence[DataFile]) -> Content:
    kinds = _kinds_of(files)
    _require_rows(kinds, files)
    for name, kind in kinds.items():
        if kind in ("mixed", "json"):
            logger.warning(
                "%s: column %r holds %s.",
                ", ".join(str(file.path) for file in files[:3]),
                name,
                "texts beside numbers, or true and false: all are read as the texts that stand there"
                if kind == "mixed"
                else "lists or objects beside other values, and is neither text nor label",
            )
    return _schema(kinds), _whole_tables(files, kinds)


def _require_rows(kinds: Mapping[str, Kind], files: Sequence[DataFile]) -> None:
    if not kinds:
        raise ConfigError(f"{files[0].path} holds no rows; give data with at least one.")


def _schema(kinds: Mapping[str, Kind]) -> pa.Schema:
    return pa.schema({name: _type(kind) for name, kind in kinds.items()})


def _tables(files: Sequence[DataFile], kinds: Mapping[str, Kind]) -> Iterator[tuple[tuple[int, int], pa.Table]]:
    """Yield the rows of a stream, a thousand at a time, each with a key of its own."""
    for at, file in enumerate(files):
        with closing(_batches(file)) as batches:
            for number, batch in enumerate(batches):
                _check_fit(batch, kinds)
                yield (at, number), _table(batch, kinds)


def _whole_tables(files: Sequence[DataFile], kinds: Mapping[str, Kind]) -> Iterator[pa.Table]:
    for file in files:
        with closing(_batches(file)) as batches:
            for batch in batches:
                yield _table(batch, kinds)


def _table(batch: Sequence[Row], kinds: Mapping[str, Kind]) -> pa.Table:
    schema = _schema(kinds)
    columns = [[_as(row.get(name), kind) for _, row in batch] for name, kind in kinds.items()]
    try:
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    except UnicodeEncodeError as error:
        place = next(place for place, row in batch if not _is_unicode(row))
        raise ConfigError(
            f"{place}, holds one half of a character ({error.object[error.start]!r}); correct it."
        ) from error
    return pa.table(arrays, schema=schema)


def _is_unicode(row: Mapping[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_fit(batch: Sequence[Row], kinds: Mapping[str, Kind]) -> None:
    """Raise ConfigError for a row of a stream that is of other kinds than the first rows."""
    for place, row in batch:
        for name, value in row.items():
            if name not in kinds:
                raise ConfigError(
                    f"{place}, has a column {name!r}, which the first rows of the stream lack; leave --streaming out, "
                    "or write it in the first row too (null will do)."
                )
            if not _fits(value, kinds[name]):
                first = SHOWN[kinds[name] if isinstance(kinds[name], str) else kinds[name][0]]
                raise ConfigError(
                    f"{place}: column {name!r} holds {_shown(value)} where the first rows of the stream have "
                    f"{first}; leave --streaming out, or write all of them alike."
                )


def _fits(value: Any, kind: Kind) -> bool:
    try:
        return bool(_type(_common(kind, _kind(value))) == _type(kind))
    except DiffersError:
        return False


def _kinds_of(files: Sequence[DataFile], *, batches: int | None = None) -> dict[str, Kind]:
    """Return the kind of each column, over all rows or those of the first `batches`."""
    kinds: dict[str, Kind] = {}
    for file in files:
        with closing(_batches(file)) as found:
            for _, row in chain.from_iterable(islice(found, batches)):
                for name, value in row.items():
                    try:
                        kinds[name] = _common(kinds.get(name, "null"), _kind(value))
                    except DiffersError:
                        kinds[name] = "json"
    return kinds


def _kind(value: Any) -> Kind:
    """Return the kind of a value. Raises DiffersError for a list of different ones."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "int" if -(2**63) <= value < 2**63 else "mixed"
    if isinstance(value, list):
        if set(map(type, value)) == {int} and min(value) >= -(2**63) and max(value) < 2**63:
            return ("list", "int")  # tokens, of which there may be many
        return ("list", reduce(_common, map(_kind, value), "null"))
    if isinstance(value, dict):
        return ("struct", tuple((name, _kind(each)) for name, each in value.items()))
    return "float" if isinstance(value, float) else OF_TYPES[type(value)]


def _common(a: Kind, b: Kind) -> Kind:
    """Return the kind of a column that holds both. Raises DiffersError."""
    if a == b or b == "null":
        return a
    if a == "null" or b == "json":
        return b
    if a == "json":
        return a
    if isinstance(a, str) and isinstance(b, str):
        return "float" if {a, b} == {"int", "float"} else "mixed"
    if isinstance(a, str) or isinstance(b, str) or a[0] != b[0]:
        raise DiffersError
    if a[0] == "list":
        return ("list", _common(a[1], b[1]))
    first, second = dict(a[1]), dict(b[1])
    names = {**first, **second}
    return ("struct", tuple((name, _common(first.get(name, "null"), second.get(name, "null"))) for name in names))


def _type(kind: Kind) -> pa.DataType:
    if isinstance(kind, str):
        return SINGLE[kind]
    if kind[0] == "list":
        return pa.list_(_type(kind[1]))
    return pa.struct([(name, _type(each)) for name, each in kind[1]]) if kind[1] else pa.null()


def _as(value: Any, kind: Kind) -> Any:
    """Return a value as the kind of its column has it."""
    if value is None or kind in ("int", "bool", ("list", "int")):
        return value
    if kind == "json":
        return json.dumps(value)
    if kind in ("text", "mixed"):
        return value if isinstance(value, str) else value.text if isinstance(value, Written) else json.dumps(value)
    if kind == "float":
        return float(value)
    if kind[0] == "list":
        return [_as(each, kind[1]) for each in value]
    return {name: _as(value.get(name), each) for name, each in kind[1]} or None


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return f"an object of {', '.join(value) or 'nothing'}" if isinstance(value, dict) else SHOWN[_kind(value)]


def _batches(file: DataFile) -> Generator[list[Row]]:
    """Yield a thousand rows at a time. Raises ConfigError, which names the place, for what is no row."""
    try:
        with opened(file) as content, io.TextIOWrapper(content, encoding="utf-8-sig") as text:
            rows = _rows(file, text)
            while batch := list(islice(rows, BATCH_ROWS)):
                yield batch
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file.path} is not UTF-8: {error}; convert it.") from error
    except (EOFError, OSError, lzma.LZMAError) as error:
        raise ConfigError(f"{file.path} can't be read: {error}.") from error


def _rows(file: DataFile, text: IO[str]) -> Iterator[Row]:
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=_written, strict=False)
    head: list[str] = []
    for line in text:
        head.append(line)
        if line.strip():
            break
    if head and not _is_object(head[-1], decoder):
        yield from _rows_of_document(file, "".join(head) + text.read(), decoder)
        return
    for number, line in enumerate(chain(head, text), start=1):
        if line.strip():
            place = f"{file.path}, line {number}"
            try:
                value = decoder.decode(line)
            except ValueError as error:
                raise ConfigError(f"{place}, can't be read: {getattr(error, 'msg', error)}; correct it.") from error
            yield place, _row(place, value)


def _is_object(line: str, decoder: json.JSONDecoder) -> bool:
    """Whether a line is complete and no list of rows."""
    try:
        return not isinstance(decoder.decode(line), list)
    except ValueError:
        return False


def _rows_of_document(file: DataFile, text: str, decoder: json.JSONDecoder) -> Iterator[Row]:
    """Yield the rows of a list, or of objects that go over several lines."""
    number, at = 0, _after_space(text, 0)
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError as error:
            place = f"{file.path}, line {error.lineno}," if isinstance(error, json.JSONDecodeError) else f"{file.path}"
            raise ConfigError(f"{place} can't be read: {getattr(error, 'msg', error)}; correct it.") from error
        at = _after_space(text, at)
        for each in value if isinstance(value, list) else [value]:
            number += 1
            place = f"{file.path}, row {number}"
            yield place, _row(place, each)


def _after_space(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return at if match is None else match.end()


def _row(place: str, value: Any) -> dict[str, Any]:
    """Return an object as it is, and a bare text as the column `text`."""
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ConfigError(f'{place}, is {_shown(value)} and no object; write rows as {{"text": ...}}.')
    return value


def _written(text: str) -> Written:
    number = Written(text)
    number.text = text
    return number


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found
