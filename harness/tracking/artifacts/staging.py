"""Staged files: artifacts as hard links beside the checkpoints until W&B has them, and a record of each."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from harness.errors import StagingError
from harness.files import sync as sync_path
from harness.files import write_whole, written_whole
from harness.tracking.client import one_line
from harness.tracking.damage import is_count, is_number, read_json

logger = logging.getLogger(__name__)

STAGING_FOLDER = "wandb-artifacts"
RECORD_FILE = "artifact.json"
FORMAT_VERSION = 1
NUMBERED = re.compile(r"(\d+)-.+")
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS)
_PASSED_OVER: set[Path] = set()  # records that were told
CLOCK_NS = 10_000_000  # a copy keeps the time only as finely as its file system does


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged:
    """
    An artifact that W&B does not have yet, as `artifact.json` describes it.

    `files` maps a name in the artifact to the file's size, time and, unless it was written here, the path that it
    is linked from. `saved_at` (seconds since 1970) orders the versions of a collection; 0 is older than all.
    `sync_dir` is the folder of the offline run that has it recorded.
    """

    folder: Path
    name: str
    aliases: list[str]
    metadata: dict[str, Any]
    description: str
    entity: str
    project: str
    run_id: str
    saved_at: float
    files: dict[str, dict[str, Any]]
    registry: str | None = None
    sync_dir: str | None = None

    @property
    def number(self) -> int:
        """The number that orders those staged in the same folder."""
        return int(self.folder.name.partition("-")[0])

    @property
    def is_waiting(self) -> bool:
        """Whether it is still staged; `discard` removes the record first."""
        return (self.folder / RECORD_FILE).exists()

    def path_of(self, name: str) -> Path:
        """Where a file of the artifact waits."""
        return self.folder / "files" / name

    def pinned_bytes(self) -> int:
        """Return the bytes that are on the disk only for this artifact: files whose other link is gone, and copies."""
        stats = [path.stat() for path in map(self.path_of, self.files) if path.exists()]
        return sum(stat.st_size for stat in stats if stat.st_nlink == 1)

    def is_copied(self) -> bool:
        """Whether the file system had no hard links to offer."""
        linked = [self.path_of(name) for name, facts in self.files.items() if facts["source"]]
        return any(path.stat().st_nlink == 1 for path in linked)


def stage(root: Path, *, links: Mapping[str, Path], texts: Mapping[str, str], **fields: Any) -> Staged:
    """
    Stage files under `root`: the record first, then a hard link for each file of `links`.

    After a kill in between, `complete` makes the missing links. Raises OSError, and leaves nothing then.
    """
    if not links and not texts:
        raise FileNotFoundError("there are no files")
    root.mkdir(parents=True, exist_ok=True)
    taken = [int(found[1]) for path in root.iterdir() if (found := NUMBERED.fullmatch(path.name))]
    folder = root / f"{max(taken, default=0) + 1:04d}-{fields['name']}"
    folder.mkdir(parents=True)  # `discard` of another process may have taken the common folder away
    try:
        for name, text in texts.items():
            (folder / "files").mkdir(exist_ok=True)
            (folder / "files" / name).write_text(text, encoding="utf-8")
        files = {name: _facts(folder / "files" / name, None) for name in texts}
        files |= {name: _facts(path, path) for name, path in links.items()}
        staged = Staged(folder=folder, files=files, **fields)
        write_record(staged)
        complete(staged)
    except (OSError, StagingError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(str(error)) from error
    return staged


def write_record(staged: Staged) -> None:
    """Write `artifact.json` so that after a kill it is whole, or as it was; `sync` makes it outlive a crash too."""
    content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(staged)}
    del content["folder"]
    write_whole(staged.folder / RECORD_FILE, json.dumps(content, indent=2))


def sync(staged: Staged) -> None:
    """Sync the record and the links to the disk: milliseconds, or seconds after much was written."""
    for path in (staged.folder / RECORD_FILE, staged.folder / "files", staged.folder, staged.folder.parent):
        sync_path(path)


def complete(staged: Staged) -> None:
    """
    Make the links that a kill left out, and see that every file is as it was when it was staged.

    Raises StagingError if one has changed or is gone, OSError if it can't be linked.
    """
    for name, facts in staged.files.items():
        path, source = staged.path_of(name), facts["source"]
        if not path.exists() and source is not None:
            if not Path(source).exists():
                raise StagingError(f"{name} was never staged and {source} is gone")
            path.parent.mkdir(parents=True, exist_ok=True)
            _link(Path(source), path)
        if not path.exists():
            raise StagingError(f"{name} is gone from {staged.folder}")
        stat = path.stat()
        if stat.st_size != facts["size"] or abs(stat.st_mtime_ns - facts["mtime_ns"]) > CLOCK_NS:
            raise StagingError(f"{name} was changed after it was staged")


def waiting(root: Path) -> list[Staged]:
    """Return what is staged under `root`, in order. A record that can't be read is a warning."""
    if not root.is_dir():
        return []
    found = []
    for record in root.glob(f"*/{RECORD_FILE}"):
        if not NUMBERED.fullmatch(record.parent.name):
            continue
        try:
            found.append(_parse_record(record))
        except (OSError, ValueError) as error:
            if record not in _PASSED_OVER:
                logger.warning("Passed over %s, it is not uploaded: %s", record, one_line(error))
            _PASSED_OVER.add(record)
    return sorted(found, key=lambda staged: staged.number)


def _parse_record(path: Path) -> Staged:
    """Read a record. Raises OSError and ValueError for what is none."""
    content = read_json(path)
    if not isinstance(content, dict) or not is_count(version := content.pop("format_version", None)):
        raise ValueError("it is no record of a staged artifact")
    if version > FORMAT_VERSION:
        raise ValueError("written by a newer version")
    for name, is_valid in IS_VALID.items():
        if not is_valid(content.get(name)):
            raise ValueError(f"{name} is {content.get(name)!r:.60}")
    try:
        return Staged(folder=path.parent, **content)
    except TypeError as error:  # a name that this version does not know
        raise ValueError(str(error)) from error


def _is_file(name: Any, facts: Any) -> bool:
    """Whether a file of a record lies in its folder, and is described as `stage` does."""
    place = PurePosixPath(name)
    is_inside = bool(place.parts) and not place.is_absolute() and ".." not in place.parts
    if not is_inside or not isinstance(facts, dict):
        return False
    return (
        is_count(facts.get("size")) and isinstance(facts.get("mtime_ns"), int) and _is_text(facts.get("source"), None)
    )


def _is_text(value: Any, *others: Any) -> bool:
    return value in others if not isinstance(value, str) else "\0" not in value


IS_VALID: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("name", "description", "entity", "project", "run_id"), _is_text),
    **dict.fromkeys(("registry", "sync_dir"), lambda value: _is_text(value, None)),
    "aliases": lambda value: isinstance(value, list) and bool(value) and all(map(_is_text, value)),
    "metadata": lambda value: isinstance(value, dict),
    "saved_at": is_number,
    "files": lambda value: isinstance(value, dict) and all(_is_file(*each) for each in value.items()),
}


def sweep(root: Path) -> None:
    """Remove what has no record: begun or already discarded when the process was killed. For the writer alone."""
    for folder in root.iterdir() if root.is_dir() else ():
        if NUMBERED.fullmatch(folder.name) and not (folder / RECORD_FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def discard(staged: Staged) -> None:
    """Remove the staged links, the record first; the last one takes the common folder with it."""
    (staged.folder / RECORD_FILE).unlink(missing_ok=True)
    shutil.rmtree(staged.folder, ignore_errors=True)
    try:
        staged.folder.parent.rmdir()
    except OSError:  # not empty
        return


def _facts(path: Path, source: Path | None) -> dict[str, Any]:
    stat = path.stat()
    where = None if source is None else str(source.absolute())
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "source": where}


def _link(source: Path, target: Path) -> None:
    source = source.resolve()  # a link to a symbolic link would outlive nothing
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with written_whole(target) as partial:
            shutil.copy2(source, partial)
