"""Artifacts as inputs: found in W&B by a `wandb:` path, downloaded, verified. Nothing in them is trusted."""

from __future__ import annotations

import errno
import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from harness.errors import ConfigError, UnreachableError
from harness.tracking.artifacts.upload import CHECKPOINT_ALIAS
from harness.tracking.client import (
    addresses_of,
    failures,
    fetch,
    has_content_of,
    one_line,
    open_api,
    read_manifest,
    separate_randomness,
)
from harness.tracking.flags import TrackingConfig
from harness.tracking.run.identity import Identity

logger = logging.getLogger(__name__)

PREFIX = "wandb:"
PATH = re.compile(r"(?:(?:(?P<entity>[^/:]+)/)?(?P<project>[^/:]+)/)?(?P<name>[^/:]+)(?::(?P<alias>[^/:]+))?")
ATTEMPTS = 5
AT_A_TIME = 8
PATIENCE_SECONDS = 60.0  # in which as many bytes have to come as of a very slow line
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def is_artifact(path: str | None) -> bool:
    """Whether a path is one in W&B."""
    return path is not None and path.startswith(PREFIX)


def find_artifact(flag: str, path: str, config: TrackingConfig, *, run: Identity | None = None) -> Any:
    """
    The version that `wandb:ENTITY/PROJECT/NAME:ALIAS` names; what is left out is the user's, the run's, `latest`.

    A bare `wandb:` is the newest checkpoint of the run, as known from `run` or --wandb_run_id. Raises ConfigError.
    """
    given = path.removeprefix(PREFIX)
    parts = PATH.fullmatch(given)
    if given and parts is None:
        raise ConfigError(f"--{flag}={path} is no artifact: write wandb:ENTITY/PROJECT/NAME:ALIAS.")
    separate_randomness()
    try:
        api = open_api("harness train")
    except UnreachableError as error:
        raise ConfigError(
            f"--{flag}={path}: {error} Where there is no network, download it elsewhere "
            f"(wandb artifact get {given or 'ENTITY/PROJECT/NAME:latest'} --root FOLDER) and give the folder."
        ) from error
    project = (run.project if run else None) or config.wandb_project or config.project
    entity = (run.entity if run else None) or config.wandb_entity or _asked(flag, path, lambda: api.default_entity)
    if parts is None:
        run_id = config.wandb_run_id or (run.run_id if run else None)
        return _newest_checkpoint(flag, path, api, f"{entity}/{project}", run_id)
    name = f"{parts['entity'] or entity}/{parts['project'] or project}/{parts['name']}:{parts['alias'] or 'latest'}"
    found = _asked(flag, path, lambda: api.artifact(name))
    check_manifest(flag, path, found)
    return found


def sibling(flag: str, artifact: Any, alias: str) -> Any:
    """Another version of the same collection, None if there is none that can be had."""
    name = f"{artifact.qualified_name.rpartition(':')[0]}:{alias}"
    try:
        found = open_api("harness train").artifact(name)
        check_manifest(flag, f"{PREFIX}{name}", found)
    except Exception as error:  # as in `_asked`
        logger.warning("%s is not brought: %s", name, one_line(error))
        return None
    return found


def step_of(artifact: Any) -> int | None:
    """The optimizer step of a checkpoint's version, from its alias."""
    steps = [int(alias.rpartition("_")[2]) for alias in artifact.aliases if CHECKPOINT_ALIAS.fullmatch(alias)]
    return max(steps, default=None)


def is_there(artifact: Any, folder: Path, names: Sequence[str]) -> bool:
    """Whether the folder holds these files of the version as W&B has them. Reads them."""
    return folder.is_dir() and not _wrong(artifact, folder, names)


def place_of(artifact: Any) -> Path:
    """Where wandb downloads the version to: `artifacts/NAME:v3`, or below WANDB_ARTIFACT_DIR. Raises ConfigError."""
    from wandb.env import get_artifact_dir

    name = str(artifact.name)
    if PATH.fullmatch(name) is None or "/" in name or name.startswith("."):
        raise ConfigError(f"W&B calls a version {name!r:.200}, which is no name for a folder: it is not downloaded.")
    return Path(get_artifact_dir()) / name


def download(flag: str, artifact: Any, folder: Path, names: Sequence[str]) -> None:
    """
    Bring these files of the version into the folder: whole, each with the digest that W&B has of it.

    A file that was cut or changed on its way is tried again. Raises ConfigError.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        wrong = _wrong(artifact, folder, names)
        if not wrong:
            return
        if attempt:
            logger.warning("Downloading %s: %s; tried again.", artifact.qualified_name, reason)
            time.sleep(2**attempt / 2)
        reason = _attempt(flag, artifact, folder, wrong)
    if wrong := _wrong(artifact, folder, names):
        raise ConfigError(
            f"--{flag}: {artifact.qualified_name} could not be downloaded whole, {', '.join(wrong[:3])} is missing or "
            f"damaged after {ATTEMPTS} attempts ({reason}); try again, or take another version."
        )


def bring(flag: str, artifact: Any, folder: Path, names: Sequence[str]) -> None:
    """
    Download the files of the version that the folder lacks, or has otherwise than W&B.

    Others may read the folder, or download the same files at the same time. Raises ConfigError.
    """
    if not (missing := _wrong(artifact, folder, names)):
        return
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        download(flag, artifact, partial, missing)
        for name in missing:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).replace(folder / name)
    except OSError as error:
        raise ConfigError(f"--{flag}: {artifact.qualified_name} can't be written to {folder}: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def record_use(run: Any, names: Sequence[str]) -> None:
    """Rank zero: tell W&B that the open run goes back to these versions, ENTITY/PROJECT/NAME:v3; run: None without."""
    if not names or run is None or run.disabled:
        return
    if run.offline:
        logger.warning("The run is offline: W&B does not learn that it goes back to %s.", ", ".join(names))
        return
    for name in names:
        try:
            run.use_artifact(name)
        except _refusals() as error:
            logger.warning("W&B did not take down that the run goes back to %s: %s", name, one_line(error))


def _refusals() -> tuple[type[Exception], ...]:
    return (UnreachableError, ValueError, *failures())


def _attempt(flag: str, artifact: Any, folder: Path, names: Sequence[str]) -> str:
    """Download once; returns why it failed. Raises ConfigError where another attempt is of no use."""
    try:
        for name in names:
            (folder / name).unlink(missing_ok=True)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sizes = {name: artifact.manifest.entries[name].size for name in names}
        free = shutil.disk_usage(folder).free
        if (needed := sum(sizes.values())) > free:
            raise OSError(errno.ENOSPC, f"No space left on device: {needed} bytes are needed, {free} are free")
        addresses = addresses_of(artifact, names)
        if missing := [name for name in names if name not in addresses]:
            return f"W&B does not say where {missing[0]} is"
        _fetch_all({name: (addresses[name], sizes[name]) for name in names}, folder)
    except OSError as error:  # also what requests raises
        if error.errno in OF_THE_DISK:
            raise ConfigError(f"--{flag}: {artifact.qualified_name} can't be written to {folder}: {error}.") from error
        return one_line(error)
    except Exception as error:  # as in `_asked`
        return one_line(error)
    return "what arrived has another digest"


def _fetch_all(files: Mapping[str, tuple[str, int]], folder: Path) -> None:
    """Download files, given by name with their addresses and sizes, some at a time. Raises the first error."""
    waiting, errors = [*files.items()][::-1], list[Exception]()

    def work() -> None:
        while waiting and not errors:
            with suppress(IndexError):
                name, (url, size) = waiting.pop()
                try:
                    fetch(url, folder / name, size=size, patience=PATIENCE_SECONDS)
                except Exception as error:  # raised below
                    errors.append(error)

    # Daemons: Ctrl-C and the end of the process do not wait for them.
    threads = [threading.Thread(target=work, name="wandb-download", daemon=True) for _ in range(AT_A_TIME)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        waiting.clear()
    if errors:
        raise errors[0]


def _wrong(artifact: Any, folder: Path, names: Sequence[str]) -> list[str]:
    """The files that are not as W&B has them."""
    return [name for name in names if not has_content_of(folder / name, artifact.manifest.entries[name])]


def _newest_checkpoint(flag: str, path: str, api: Any, project: str, run_id: str | None) -> Any:
    if run_id is None:
        raise ConfigError(
            f"--{flag}={path}: which run? Give --wandb_run_id (WANDB_RUN_ID), or wandb:ENTITY/PROJECT/NAME:latest."
        )
    logged = _asked(flag, path, lambda: list(api.run(f"{project}/{run_id}").logged_artifacts()))
    checkpoints = [each for each in logged if step_of(each) is not None]
    if not checkpoints:
        raise ConfigError(
            f"--{flag}={path}: the run {project}/{run_id} has no checkpoint in W&B; "
            "it has them with --wandb_log_model checkpoint."
        )
    ordered = _asked(flag, path, lambda: sorted(checkpoints, key=lambda each: (step_of(each) or 0, _index(each))))
    check_manifest(flag, path, ordered[-1])
    return ordered[-1]


def _index(artifact: Any) -> int:
    return int(artifact.version.removeprefix("v"))


def _asked(flag: str, path: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:  # wandb's, and whatever an answer of another form leads to in its functions
        raise ConfigError(f"--{flag}={path}: W&B does not have it, or not for you: {one_line(error)}") from error


def check_manifest(flag: str, path: str, artifact: Any) -> None:
    """
    Read what files the version has, before any of them is downloaded.

    Raises ConfigError if that can't be had, if it names files outside the artifact, on this disk or elsewhere, and if
    two of them would be one file here.
    """
    places: dict[PurePosixPath, str] = {}
    for name, entry in _asked(flag, path, lambda: read_manifest(artifact)).entries.items():
        place = PurePosixPath(name)
        if entry.ref is not None:
            raise ConfigError(f"--{flag}={path}: {name} in it is a reference to {entry.ref}: it is not followed.")
        if not place.parts or ".." in place.parts or place.is_absolute() or not re.fullmatch(r"[^\\\x00-\x1f]+", name):
            raise ConfigError(
                f"--{flag}={path}: it names a file outside its folder, {name!r:.200}: it is not downloaded."
            )
        if entry.size is None:
            raise ConfigError(f"--{flag}={path}: W&B does not say how large {name} in it is: it is not downloaded.")
        # A file system may take capitals for small letters.
        folded = PurePosixPath(str(place).casefold())
        if (other := places.setdefault(folded, name)) != name:
            raise ConfigError(f"--{flag}={path}: {name} and {other} in it would be one file: it is not downloaded.")
    for folded, name in places.items():
        if other := next((places[parent] for parent in folded.parents if parent in places), ""):
            raise ConfigError(f"--{flag}={path}: {other} in it is a file, and the folder of {name}.")
