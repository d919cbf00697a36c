"""Which files --train_file, --validation_file and --test_file name, and in what form each is."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError

# A form is one reader; its files may be given together.
FORMS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}


@dataclass(frozen=True)
class DataFile:
    """A file of data: where it is, its suffix in lower case without that of a compression, and the compression."""

    path: Path
    suffix: str
    compression: str | None

    @property
    def form(self) -> str:
        """The reader that takes it; the files of one flag have the same."""
        return FORMS[self.suffix]

    @property
    def stamp(self) -> tuple[str, int, int]:
        """What changes with the file: path, time of the last change in nanoseconds, size in bytes."""
        state = self.path.stat()
        return str(self.path.absolute()), state.st_mtime_ns, state.st_size


def data_files(flag: str, given: Sequence[str]) -> list[DataFile]:
    """
    Return the files that a flag's values name, in the order of the values.

    A value is a file, whatever characters its name has; a folder, for the files of data in it and below; or else a
    pattern (`*`, `?`, `[...]`, `**` for any folders). Files of a folder or a pattern come in the order of their names,
    numbers in them by size. Raises ConfigError for what is missing, of no known format, or of several.
    """
    source = source_of(flag, given)
    found = [file for value in given for file in _named(flag, value)]
    forms = {file.form: file for file in found}
    if len(forms) > 1:
        names = " and ".join(file.path.name for file in forms.values())
        raise ConfigError(f"{source}: {names} are of several formats; give files of one.")
    return found


def source_of(flag: str, given: Sequence[str]) -> str:
    """Return the flag with its values, for messages."""
    return f"--{flag}={' '.join(given)}"


def is_delimited(given: Sequence[str] | None) -> bool:
    """Whether the values name csv or tsv files, whose cells are texts."""
    first = next((file for value in given or () for file in _named("", value)), None)
    return first is not None and first.form == "csv"


def _named(flag: str, value: str) -> list[DataFile]:
    path, source = Path(value), f"--{flag}={value}"
    if path.is_dir():
        below = (each for each in path.rglob("*") if each.is_file() and not _is_hidden(each.relative_to(path)))
        files = [file for each in sorted(below, key=_natural) if (file := _file(each)) is not None]
        if not files:
            raise ConfigError(f"{source} is a folder without files of data ({', '.join(FORMS)}); check the path.")
        return files
    if not path.is_file() and glob.has_magic(value):
        found = glob.iglob(value, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute patterns
        matches = [path for each in found if (path := Path(each)).is_file()]
        if not matches:
            raise ConfigError(
                f"{source}: no such file, and none that matches it as a pattern (relative ones start at {Path.cwd()})."
            )
        return [_known(source, each) for each in sorted(matches, key=_natural)]
    file = _known(source, path)
    if not path.is_file():
        raise ConfigError(f"{source}: no such file; check the path (relative ones start at {Path.cwd()}).")
    return [file]


def _known(source: str, path: Path) -> DataFile:
    if (file := _file(path)) is None:
        raise ConfigError(
            f"{source}: unknown format {path.suffix!r}; use one of {', '.join(FORMS)}, plain or compressed "
            f"({', '.join(COMPRESSIONS)}; parquet is compressed within)."
        )
    return file


def _file(path: Path) -> DataFile | None:
    """Return the file; None if its name tells no known format."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    if suffix not in FORMS or (compression and suffix == ".parquet"):
        return None
    return DataFile(path, suffix, compression)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)  # _SUCCESS, .part-0.crc and the like


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Return a key that puts part-2 before part-10."""
    parts = re.split(r"([0-9]+)", str(path))
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
