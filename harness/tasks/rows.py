"""Data as rows: where it comes from, which columns count, what is held out."""

from __future__ import annotations

import fcntl
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from harness.errors import ConfigError
from harness.tasks.flags import TaskConfig

logger = logging.getLogger(__name__)

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".parquet": "parquet",
}
SPLITS = ("train", "validation", "test")
VALIDATION_NAMES = ("validation", "dev", "validation_matched")
TEST_NAMES = ("test", "test_matched")


def load_splits(config: TaskConfig, *, keep_linebreaks: bool = False) -> dict[str, Any]:
    """
    Load the raw data named by the flags as a dict of splits.

    "train", "validation" and "test" where they exist, at least one of them; other splits keep their own names.
    `keep_linebreaks` concerns txt files. Raises ConfigError for data that is missing, empty or malformed.
    """
    splits: dict[str, Any] = {}
    if config.dataset_name:
        splits = _named_splits(config, f"--dataset_name={config.dataset_name}")
    for split in SPLITS:
        path = getattr(config, f"{split}_file")
        if path is not None:
            splits[split] = _load_file(f"--{split}_file={path}", Path(path), config, keep_linebreaks)
        folder = getattr(config, f"{split}_dir", None)
        if folder is not None:
            splits[split] = _load_images(f"--{split}_dir={folder}", Path(folder), config)
    if not any(split in splits for split in SPLITS):
        raise ConfigError("No data; give --train_file or --dataset_name.")
    for split in SPLITS:
        if split in splits:
            first_row(splits[split], source(config, split))
    return splits


def hold_out(splits: Mapping[str, Any], config: TaskConfig, *, shuffled: bool = False) -> dict[str, Any]:
    """
    Split --validation_split_percentage of the training rows off as "validation" where there is none.

    The first rows are taken, as run_clm does, or `shuffled` ones where their order may follow the label. A
    stream and a single row can't be split and stay whole.
    """
    train = splits.get("train")
    if train is None or "validation" in splits or config.streaming or len(train) < 2:
        return dict(splits)
    held = max(1, round(len(train) * config.validation_split_percentage / 100))
    if shuffled:
        # A seed of its own: the parts stay the same whatever --seed a run has.
        train = train.shuffle(seed=0)
    return {**splits, "validation": train.select(range(held)), "train": train.select(range(held, len(train)))}


def cut(dataset: Any, limit: int | None) -> Any:
    """Keep the first `limit` samples, all of them for None."""
    if dataset is None or limit is None:
        return dataset
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.take(limit)
    return dataset.select(range(min(limit, len(dataset))))


def source(config: TaskConfig, split: str) -> str:
    """Say which flag a split came from, for messages."""
    for flag in (f"{split}_file", f"{split}_dir"):
        if (path := getattr(config, flag, None)) is not None:
            return f"--{flag}={path}"
    name = config.dataset_name or config.task_name
    if name is None and config.train_dir is not None:
        return f"--train_dir={config.train_dir}"
    return f"--train_file={config.train_file}" if name is None else f"--dataset_name={name} ({split})"


def first_row(dataset: Any, given: str) -> dict[str, Any]:
    """Read the first row. Raises ConfigError where there is none, or a stream is malformed there."""
    with _user_data(given):
        row = next(iter(dataset), None)
    if row is None:
        raise ConfigError(f"{given} holds no rows; give data with at least one.")
    return dict(row)


def columns_of(dataset: Any, given: str) -> list[str]:
    """Name the columns; a stream may know them from its first row only."""
    return list(dataset.column_names or first_row(dataset, given))


def string_columns(dataset: Any, given: str) -> list[str]:
    """Name the columns of strings, judged by the features or, in a stream without, by its first row."""
    if dataset.features is not None:
        kinds = {name: getattr(feature, "dtype", None) for name, feature in dataset.features.items()}
        return [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    return [name for name, value in first_row(dataset, given).items() if isinstance(value, str)]


def require_columns(flag: str, names: Sequence[str], dataset: Any, given: str) -> None:
    """Refuse names that are no columns of the data. Raises ConfigError with the columns there are."""
    present = columns_of(dataset, given)
    for name in names:
        if name not in present:
            raise ConfigError(f"--{flag}: {given} has no column {name!r}; its columns: {', '.join(present)}.")


def label_column(config: TaskConfig, splits: Mapping[str, Any]) -> str:
    """The column of --label_column_name, else `label` or `labels`. Raises ConfigError where it is missing."""
    given = source(config, "train")
    present = columns_of(splits["train"], given)
    column = config.label_column_name or next((name for name in ("label", "labels") if name in present), None)
    if column is None:
        raise ConfigError(
            f"{given} has no column `label` or `labels`, only: {', '.join(present)}; name one by --label_column_name."
        )
    for split in ("train", "validation"):
        if split in splits:
            require_columns("label_column_name", [column], splits[split], source(config, split))
    return column


def text_columns(config: TaskConfig, splits: Mapping[str, Any]) -> list[str]:
    """
    Choose the columns to read as one text: --text_column_names, else `text`, else the first of strings.

    Raises ConfigError for a name that one of the splits lacks, and where no column holds strings.
    """
    first = next(split for split in SPLITS if split in splits)
    given = source(config, first)
    strings = string_columns(splits[first], given)
    if config.text_column_names:
        columns = column_names(config)
    elif strings:
        columns = ["text" if "text" in strings else strings[0]]
    else:
        present = ", ".join(columns_of(splits[first], given))
        raise ConfigError(f"{given} has no column of strings, only: {present}; name one by --text_column_names.")
    for split in SPLITS:
        if split in splits:
            require_columns("text_column_names", columns, splits[split], source(config, split))
    return columns


def column_names(config: TaskConfig) -> list[str]:
    """The names that --text_column_names lists."""
    return [name.strip() for name in (config.text_column_names or "").split(",") if name.strip()]


def joined(batch: Mapping[str, Sequence[Any]], columns: Sequence[str], delimiter: str) -> list[str]:
    """Join the columns of a batch to one text a row; an empty cell counts as an empty text."""
    rows = zip(*(batch[column] for column in columns), strict=True)
    return [delimiter.join("" if value is None else str(value) for value in row) for row in rows]


def transform(dataset: Any, function: Callable[[Any], Any], config: TaskConfig, remove: Sequence[str] = ()) -> Any:
    """
    Apply a function to batches of rows: cached on disk, or lazily in a stream.

    The function should be a closure: `datasets` then hashes its code into the cache's key. Of a function that
    can be imported it hashes the name only, so a changed one would find old results. One process at a time
    prepares, the others find its result.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(function, batched=True, remove_columns=list(remove))
    with _one_at_a_time(dataset, function.__name__):
        return dataset.map(
            function,
            batched=True,
            remove_columns=list(remove),
            num_proc=config.preprocessing_num_workers,
            load_from_cache_file=not config.overwrite_cache,
        )


@contextmanager
def _one_at_a_time(dataset: Any, name: str) -> Iterator[None]:
    """Wait for processes, of any node that shares the cache, that apply this to the data; one that dies ends it."""
    try:  # without a cache on disk, or where nothing can be locked, each prepares its own
        file = (Path(dataset.cache_files[0]["filename"]).parent / f"{dataset._fingerprint}-{name}.lock").open("a")
    except (IndexError, OSError):
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process prepares the same data (%s): waiting for it.", file.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            logger.info("%s can't be locked: each process prepares the data.", file.name)
        yield


def grouped(tokens: Mapping[str, Sequence[Sequence[int]]], size: int) -> dict[str, list[list[int]]]:
    """Join a batch of token lists, cut it into pieces of `size`, and drop the rest of the batch."""
    lines = {name: list(itertools.chain.from_iterable(values)) for name, values in tokens.items()}
    return {
        name: [line[start : start + size] for start in range(0, len(line) - size + 1, size)]
        for name, line in lines.items()
    }


def require_samples(dataset: Any, given: str, reason: str) -> None:
    """Refuse data of which preparation left nothing. Raises ConfigError that gives the `reason`."""
    with _user_data(given):
        sample = next(iter(dataset), None)
    if sample is None:
        raise ConfigError(f"{given}: {reason}")


def _named_splits(config: TaskConfig, given: str) -> dict[str, Any]:
    raw = _load_named(config, given)
    if not isinstance(raw, Mapping):
        raw = {config.train_split_name: raw}
    splits = dict(raw)
    wanted = (
        ("train", (config.train_split_name,), True),
        *(
            (split, (name,) if name else defaults, name is not None)
            for split, name, defaults in (
                ("validation", config.validation_split_name, VALIDATION_NAMES),
                ("test", config.test_split_name, TEST_NAMES),
            )
        ),
    )
    for split, names, needed in wanted:
        found = next((name for name in names if name in raw), None)
        if found is not None:
            splits[split] = raw[found]
        elif needed and getattr(config, f"{split}_file") is None:
            flag = f"--{split}_split_name={names[0]}"
            raise ConfigError(f"{flag}: {given} has no such split; its splits: {', '.join(raw)}.")
    return splits


def _load_named(config: TaskConfig, given: str) -> Any:
    folder = Path(config.dataset_name or "")
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        with _user_data(given):
            saved = datasets.load_from_disk(str(folder))
        if not config.streaming:
            return saved
        if isinstance(saved, datasets.DatasetDict):
            return {name: split.to_iterable_dataset() for name, split in saved.items()}
        return saved.to_iterable_dataset()
    with _user_data(given):
        return datasets.load_dataset(
            config.dataset_name,
            config.dataset_config_name,
            cache_dir=config.cache_dir,
            token=config.token,
            streaming=config.streaming,
        )


def _load_file(given: str, path: Path, config: TaskConfig, keep_linebreaks: bool) -> Any:
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{given}: unknown format {path.suffix!r}; use one of {', '.join(FORMATS)}.")
    if not path.is_file():
        raise ConfigError(f"{given}: no such file; check the path (relative ones start at {Path.cwd()}).")
    if path.stat().st_size == 0:
        raise ConfigError(f"{given} is empty; give a file with at least one row.")
    options: dict[str, Any] = {}
    if path.suffix.lower() == ".tsv":
        options["sep"] = "\t"
    if path.suffix.lower() == ".txt":
        options["keep_linebreaks"] = keep_linebreaks
    with _user_data(given):
        return datasets.load_dataset(
            FORMATS[path.suffix.lower()],
            data_files={"data": str(path)},
            split="data",
            cache_dir=config.cache_dir,
            streaming=config.streaming,
            **options,
        )


def _load_images(given: str, folder: Path, config: TaskConfig) -> Any:
    if not folder.is_dir():
        raise ConfigError(f"{given}: no such folder; check the path (relative ones start at {Path.cwd()}).")
    with _user_data(given):
        return datasets.load_dataset(
            "imagefolder", data_files={"data": str(folder / "**")}, split="data", cache_dir=config.cache_dir
        )


@contextmanager
def _user_data(given: str) -> Iterator[None]:
    """Turn what `datasets` raises for data it can't find or read into ConfigError; use it around one call."""
    try:
        yield
    except (DatasetGenerationError, OSError, ValueError) as error:
        # DatasetGenerationError says only that there was one; its cause says which.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        if "corresponds to no data" in reason[0]:
            raise ConfigError(f"{given} holds no rows; give data with at least one.") from error
        raise ConfigError(f"{given} can't be read: {reason[0]}") from error
