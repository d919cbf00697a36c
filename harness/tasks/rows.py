"""Read the data that the flags name: files, folders of images, data sets of the Hub or saved on disk."""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesList
from fsspec.compression import register_compression

from harness.config import flags_of
from harness.errors import ConfigError
from harness.tasks import delimited, image_rows, json_rows
from harness.tasks.arrow_cache import cache_folder
from harness.tasks.files import DataFile, data_files, is_delimited, source_of
from harness.tasks.flags import TaskConfig
from harness.tasks.hub import Wanted, snapshot_of
from harness.tasks.splits import SPLITS, Split, Splits, user_data

logger = logging.getLogger(__name__)

VALIDATION_NAMES = ("validation", "dev", "validation_matched")
# What `datasets` says of a data set that it has not, where the Hub does not answer.
UNREACHED = ("Couldn't reach", "offline mode", "Couldn't find cache for", "LocalEntryNotFoundError")
TEST_NAMES = ("test", "test_matched")


def load_splits(config: TaskConfig, *, keep_linebreaks: bool = False) -> Splits:
    """
    Load the raw data that the flags name, in its splits.

    "train", "validation" and "test" where they exist, at least one of them; other splits keep their own names.
    `keep_linebreaks` concerns txt files. Raises ConfigError for data that is missing, empty or malformed.
    """
    splits = Splits()
    if config.dataset_name:
        source = f"--dataset_name={config.dataset_name}"
        for name, rows in _named_splits(config, source).items():
            splits[name] = Split(name, rows, f"{source} ({name})")
    for name in SPLITS:
        if (given := getattr(config, f"{name}_file")) is not None:
            rows = _load_files(f"{name}_file", given, config, keep_linebreaks)
            splits[name] = Split(name, rows, source_of(f"{name}_file", given), is_delimited(given))
        if (folder := getattr(config, f"{name}_dir", None)) is not None:
            splits[name] = image_rows.load(name, folder, config)
    _check_csv_flags(config, splits)
    if not splits.known:
        raise ConfigError("No data; give --train_file or --dataset_name.")
    for split in splits.known:
        split.first_row()  # raises ConfigError for an empty one
    return splits


def _check_csv_flags(config: TaskConfig, splits: Splits) -> None:
    """Refuse flags of csv files where none is read."""
    if any(split.is_delimited for split in splits.values()):
        return
    flags = flags_of(TaskConfig)
    for name in ("csv_delimiter", "csv_quoting", "csv_header"):
        if (value := getattr(config, name)) != flags[name].default:
            raise ConfigError(f"--{name}={value} is of csv and tsv files, and none is given; leave it out.")


def _named_splits(config: TaskConfig, source: str) -> dict[str, Any]:
    raw = _load_named(config, source)
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
            raise ConfigError(f"{flag}: {source} has no such split; its splits: {', '.join(raw)}.")
    return splits


def _load_named(config: TaskConfig, source: str) -> Any:
    folder = Path(config.dataset_name or "")
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        with user_data(source):
            saved = datasets.load_from_disk(str(folder))
        if not config.streaming:
            return saved
        if isinstance(saved, datasets.DatasetDict):
            return {name: split.to_iterable_dataset() for name, split in saved.items()}
        return saved.to_iterable_dataset()
    if folder.is_dir() and glob.has_magic(str(folder)):
        raise ConfigError(
            f"{source}: `datasets` takes {folder} as a pattern and would read other folders; rename it, or name its "
            "files by --train_file."
        )
    try:
        return _load_dataset(str(config.dataset_name), config, source)
    except ConfigError as error:
        if not any(each in str(error) for each in UNREACHED):
            raise
        # `datasets` alone would not look for what `hf download` has brought.
        if (downloaded := snapshot_of(str(config.dataset_name), config, is_dataset=True)) is not None:
            return _load_dataset(str(downloaded), config, source)
        fetch = Wanted("dataset_name", str(config.dataset_name), is_dataset=True).download(config)
        raise ConfigError(
            f"{source}: no such folder here, not in the cache, and the Hub can't be reached; check the name, or run "
            f"`{fetch}` where there is a network first."
        ) from error


def _load_dataset(name: str, config: TaskConfig, source: str) -> Any:
    with user_data(source):
        return datasets.load_dataset(
            name,
            config.dataset_config_name,
            cache_dir=config.cache_dir,
            token=config.token,
            streaming=config.streaming,
        )


def _load_files(flag: str, given: Sequence[str], config: TaskConfig, keep_linebreaks: bool) -> Any:
    source, files = source_of(flag, given), data_files(flag, given)
    if empty := next((file for file in files if file.path.stat().st_size == 0), None):
        named = "" if [str(empty.path)] == list(given) else f": {empty.path}"
        raise ConfigError(f"{source}{named} is empty; give a file with at least one row.")
    if len(files) > len(given):
        logger.info("%s: %d files, %s to %s.", source, len(files), files[0].path, files[-1].path)
    form = files[0].form
    with user_data(source):
        if form in ("csv", "json"):
            return (delimited if form == "csv" else json_rows).load(files, config)
        return datasets.load_dataset(
            form,
            data_files={"data": _as_they_are(files, config)},
            split="data",
            cache_dir=config.cache_dir,
            streaming=config.streaming,
            **({"keep_linebreaks": keep_linebreaks, "encoding": "utf-8-sig"} if form == "text" else {}),
        )


def _as_they_are(files: Sequence[DataFile], config: TaskConfig) -> DataFilesList:
    """Return the files for `datasets`, which would take a path with `[1]` in it as a pattern."""
    if any(file.compression == "zstd" for file in files):
        delimited.require_zstd()
        # The openers that fsspec may have for zstd stop after a file's first frame, or need another package.
        register_compression("zstd", _zstd, "zst", force=True)
    return DataFilesList(
        [str(_plainly_named(file, config)) for file in files], [tuple(map(str, file.stamp[1:])) for file in files]
    )


def _zstd(raw: Any, mode: str = "rb") -> Any:  # noqa: ARG001 - as fsspec calls it
    return delimited.decompressed(raw, "zstd")


def _plainly_named(file: DataFile, config: TaskConfig) -> Path:
    """Return the path, or that of a link to it where `datasets` would make something else of its characters."""
    path = file.path.absolute()
    if "::" not in str(path) and not (file.compression and set(str(path)) & set("[]*?#%")):
        return path
    link = cache_folder(config) / "links" / hashlib.sha256(str(path).encode()).hexdigest()[:16]
    link = link.with_suffix("".join((file.suffix, path.suffix if file.compression else "")))
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        with suppress(FileExistsError):  # another process was faster
            link.symlink_to(path)
    return link
