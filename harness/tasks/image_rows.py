"""Read folders of images: a subfolder a class, or a file `metadata` with a row for each image."""

from __future__ import annotations

import glob
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from harness.errors import ConfigError
from harness.tasks import delimited, json_rows
from harness.tasks.files import DataFile
from harness.tasks.flags import TaskConfig
from harness.tasks.splits import Split, user_data

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def load(name: str, given: str, config: TaskConfig) -> Split:
    """
    Return the images of the folder --NAME_dir as the part of the data of that name.

    With metadata in it or below, their rows and columns, with `image` for `file_name` and `x` for `x_file_name`; else
    `image`, and `label` where there are folders of classes. Raises ConfigError for an image that would be left out.
    """
    source, folder = f"--{name}_dir={given}", Path(given)
    if not folder.is_dir():
        raise ConfigError(f"{source}: no such folder; check the path (relative ones start at {Path.cwd()}).")
    # Without hidden files, but with folders that are links.
    names = glob.iglob("**", root_dir=folder, recursive=True)  # noqa: PTH207 - Path.rglob follows no links
    paths = [folder / each for each in sorted(names)]
    images = [path for path in paths if path.suffix.lower() in ImageFolder.EXTENSIONS and not path.is_dir()]
    metadata = [DataFile(path, path.suffix, None) for path in paths if path.name in METADATA]
    _check_archives(source, paths, metadata)
    if not metadata:
        return Split(name, _of_classes(source, folder, images, config), source)
    with user_data(source):
        return Split(name, _described(source, metadata, images, config), source, metadata[0].form == "csv")


def _check_archives(source: str, paths: Sequence[Path], metadata: Sequence[DataFile]) -> None:
    """Refuse archives with images that metadata may describe, or with metadata."""
    for path in paths:
        if path.suffix.lower() == ".zip" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                within = [name for name in archive.namelist() if Path(name).name in METADATA]
            if metadata or within:
                reason = f"holds {within[0]}" if within else f"lies beside {metadata[0].path.name}"
                raise ConfigError(f"{source}: {path} {reason}, and is not read then; unpack it, or move it away.")


def _of_classes(source: str, folder: Path, images: Sequence[Path], config: TaskConfig) -> Any:
    # Where labels are the names of its subfolders, a single one is a label too.
    has_classes = any(each.is_dir() for each in folder.iterdir())
    if has_classes:
        _check_classes(source, folder, images)
    with user_data(source):
        return datasets.load_dataset(
            "imagefolder",
            data_files={"data": f"{glob.escape(str(folder))}/**"},
            split="data",
            cache_dir=config.cache_dir,
            **({"drop_labels": False} if has_classes else {}),
        )


def _check_classes(source: str, folder: Path, images: Sequence[Path]) -> None:
    """Refuse images elsewhere than directly in the folders of the classes: their class would be some other folder."""
    for path in images:
        within = path.relative_to(folder)
        if len(within.parts) != 2:
            where = "beside" if len(within.parts) == 1 else "below"
            raise ConfigError(
                f"{source}: {within} lies {where} the folders of the classes, "
                "each of which holds its images directly; move it, or name the folder that holds the classes."
            )
        if within.parts[0].startswith("__"):
            raise ConfigError(
                f"{source}: `datasets` leaves the images of the folder {within.parts[0]} out, for the name begins with "
                "`__`; rename it, or move it away."
            )


def _described(source: str, metadata: Sequence[DataFile], images: Sequence[Path], config: TaskConfig) -> Any:
    """Return the rows of the metadata, each with its image, in their order."""
    if other := next((file for file in metadata if file.suffix != metadata[0].suffix), None):
        raise ConfigError(f"{source}: {metadata[0].path} and {other.path} are of several formats; give one.")
    rows = _rows(metadata, config)
    columns = [name for name in rows.column_names if name == "file_name" or name.endswith("_file_name")]
    if not columns:
        raise ConfigError(
            f"{source}: {metadata[0].path} has no column `file_name`, which says what image a row is of; its columns: "
            f"{', '.join(rows.column_names)}."
        )
    # Types are found over all files, and names start at the folder of their own file.
    lengths = [len(rows)] if len(metadata) == 1 else [len(_rows([file], config)) for file in metadata]
    places = [(file, row) for file, length in zip(metadata, lengths, strict=True) for row in range(1, length + 1)]
    seen: set[Path] = set()
    for column in columns:
        found = [_image(source, place, column, name) for place, name in zip(places, rows[column], strict=True)]
        seen.update(found)
        paths = [str(path.absolute()) for path in found]
        new = column.removesuffix("file_name").removesuffix("_") or "image"
        rows = rows.remove_columns(column).add_column(new, paths).cast_column(new, datasets.Image())
    if left := [image for image in images if image not in seen]:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        named = ", ".join(str(file.path) for file in metadata[:3])
        raise ConfigError(f"{source}: {left[0]}{more} has no row in {named}; write one, or move the image away.")
    return rows


def _rows(files: Sequence[DataFile], config: TaskConfig) -> Any:
    if files[0].form == "parquet":
        return datasets.Dataset(pa.concat_tables([pq.ParquetFile(file.path).read() for file in files]))
    return (delimited if files[0].form == "csv" else json_rows).load(files, config)


def _image(source: str, place: tuple[DataFile, int], column: str, name: Any) -> Path:
    """Return the path of the image that a row names: in the folder of the metadata, or below it."""
    file, row = place
    where, folder = f"{source}: {file.path}, row {row}", file.path.parent
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: {column!r} holds {name!r}, where an image's file is to be named; correct it.")
    within = os.path.normpath(name.replace("\\", "/"))
    if Path(within).is_absolute() or Path(within).parts[:1] == ("..",) or not (folder / within).is_file():
        raise ConfigError(f"{where}: {name!r} is no file in {folder} or below; correct it, or remove the row.")
    return folder / within
