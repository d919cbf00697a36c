"""Read the data that the flags name: files, folders of images, data sets of the Hub or saved on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from harness.errors import ConfigError
from harness.tasks.flags import TaskConfig
from harness.tasks.splits import SPLITS, Splits, split_of, user_data

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".parquet": "parquet",
}
VALIDATION_NAMES = ("validation", "dev", "validation_matched")
TEST_NAMES = ("test", "test_matched")


def load_splits(config: TaskConfig, *, keep_linebreaks: bool = False) -> Splits:
    """
    Load the raw data that the flags name, in its splits.

    "train", "validation" and "test" where they exist, at least one of them; other splits keep their own names.
    `keep_linebreaks` concerns txt files. Raises ConfigError for data that is missing, empty or malformed.
    """
    raw: dict[str, Any] = {}
    if config.dataset_name:
        raw = _named_splits(config, f"--dataset_name={config.dataset_name}")
    for name in SPLITS:
        path = getattr(config, f"{name}_file")
        if path is not None:
            raw[name] = _load_file(f"--{name}_file={path}", Path(path), config, keep_linebreaks)
        folder = getattr(config, f"{name}_dir", None)
        if folder is not None:
            raw[name] = _load_images(f"--{name}_dir={folder}", Path(folder), config)
    splits = Splits({name: split_of(config, name, rows) for name, rows in raw.items()})
    if not splits.known:
        raise ConfigError("No data; give --train_file or --dataset_name.")
    for split in splits.known:
        split.first_row()  # raises ConfigError for an empty one
    return splits


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
    with user_data(source):
        return datasets.load_dataset(
            config.dataset_name,
            config.dataset_config_name,
            cache_dir=config.cache_dir,
            token=config.token,
            streaming=config.streaming,
        )


def _load_file(source: str, path: Path, config: TaskConfig, keep_linebreaks: bool) -> Any:
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{source}: unknown format {path.suffix!r}; use one of {', '.join(FORMATS)}.")
    if not path.is_file():
        raise ConfigError(f"{source}: no such file; check the path (relative ones start at {Path.cwd()}).")
    if path.stat().st_size == 0:
        raise ConfigError(f"{source} is empty; give a file with at least one row.")
    options: dict[str, Any] = {}
    if path.suffix.lower() == ".tsv":
        options["sep"] = "\t"
    if path.suffix.lower() == ".txt":
        options["keep_linebreaks"] = keep_linebreaks
    with user_data(source):
        return datasets.load_dataset(
            FORMATS[path.suffix.lower()],
            data_files={"data": str(path)},
            split="data",
            cache_dir=config.cache_dir,
            streaming=config.streaming,
            **options,
        )


def _load_images(source: str, folder: Path, config: TaskConfig) -> Any:
    if not folder.is_dir():
        raise ConfigError(f"{source}: no such folder; check the path (relative ones start at {Path.cwd()}).")
    with user_data(source):
        return datasets.load_dataset(
            "imagefolder", data_files={"data": str(folder / "**")}, split="data", cache_dir=config.cache_dir
        )
