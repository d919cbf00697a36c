"""Says which W&B run a training is, in its folder and in each checkpoint, so that a later attempt goes on with it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.files import write_whole
from harness.tracking.client import new_run_id, one_line
from harness.tracking.damage import is_count, is_number, read_json
from harness.tracking.flags import TrackingConfig

logger = logging.getLogger(__name__)

IDENTITY_FILE = "wandb_run.json"
# W&B's folder of a run, in the folder `wandb` of an output_dir.
RUN_FOLDER = re.compile(r"(offline-)?run-.+")
NAMES_IN_FILE = {"offline_folders": "fragments"}  # else a field's own: runs of earlier versions go on
OF_CHECKPOINT = ("run_id", "project", "entity", "group", "first_row", "first_step", "mode", "name", "artifacts")


def _is_process(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and is_count(value[0]) and (isinstance(value[1], str) or is_number(value[1]))


def _is_processes(value: Any) -> bool:
    """Whether it is {} or what `describe_processes` returns."""
    if not isinstance(value, dict) or not value:
        return isinstance(value, dict)
    cores = value.get("cores")
    has_cores = isinstance(cores, list) and all(map(_is_process, cores))
    return isinstance(value.get("host"), str) and _is_process(value.get("owner")) and has_cores


# By the type of a field: whether a value of it can be.
IS_VALID: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "int": is_count,
    "int | None": lambda value: value is None or is_count(value),
    "dict[str, int | None]": lambda value: isinstance(value, dict) and all(map(IS_VALID["int | None"], value.values())),
    "dict[str, Any]": _is_processes,
}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """
    A W&B run. Its first row is `first_row` of the training and has the step `first_step` (None: not known yet).

    - mode: online or offline, which never changes; "" before it was opened.
    - name: what it was asked to be called by, "" if by nothing; None: not known, as of earlier versions.
    - artifacts: what its artifacts are called by, model-... and checkpoint-...; None: not known, or not chosen yet.
    - forked_from: the id of the run from whose checkpoint this one began.
    - offline_folders: its offline run folders, relative to the file where they can be, and the steps in each.
    - steps_elsewhere: the steps before those, which an offline run left in the folder that its checkpoint is from.
    - processes, exit_code: of the last attempt; None if it did not end by itself.
    """

    run_id: str
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    first_row: int = 0
    first_step: int | None = None
    mode: str = ""
    name: str | None = None
    artifacts: str | None = None
    forked_from: str | None = None
    offline_folders: dict[str, int | None] = field(default_factory=dict)
    steps_elsewhere: int = 0
    processes: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def of_checkpoint(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it: all that holds on another machine too."""
        own = dataclasses.asdict(self)
        return {name: own[name] for name in OF_CHECKPOINT}


def parse(values: Any, *, source: str = "the checkpoint") -> Identity | None:
    """
    Return the identity in JSON values, None if there is none. Names of a newer version are ignored.

    None, and a warning, if a value is of another type than was written: half an identity would be another run's.
    """
    names = {each.name: NAMES_IN_FILE.get(each.name, each.name) for each in dataclasses.fields(Identity)}
    try:
        given = {name: values[in_file] for name, in_file in names.items() if in_file in values}
        if not given.get("run_id") and isinstance(values, dict):
            return None
        for each in dataclasses.fields(Identity):
            if each.name in given and not IS_VALID[str(each.type)](given[each.name]):
                raise ValueError(f"{names[each.name]} is {given[each.name]!r:.60}")
        return Identity(**given)
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("Which W&B run it is can't be read from %s: %s", source, one_line(error))
        return None


def read(output_dir: Path) -> Identity | None:
    """Return the identity in the folder of a training; None if there is none that can be read."""
    path = output_dir / IDENTITY_FILE
    try:
        return parse(read_json(path), source=str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s can't be read, the checkpoint says which run it is: %s", path, error)
        return None


def write(output_dir: Path, identity: Identity) -> None:
    """Write it, whole or not at all; a failure is a warning."""
    path = output_dir / IDENTITY_FILE
    values = {NAMES_IN_FILE.get(name, name): value for name, value in dataclasses.asdict(identity).items()}
    try:
        write_whole(path, json.dumps(values, indent=2) + "\n", durable=True)
    except OSError as error:
        logger.warning("%s can't be written, a restart may become a run of its own: %s", path, error)


def home_of(folder: Path) -> Path:
    """Return the folder of the training that one of W&B's folders belongs to, or the folder if it belongs to none."""
    place = folder.absolute()
    if (place / IDENTITY_FILE).is_file():
        return place
    place = place.parent if RUN_FOLDER.fullmatch(place.name) else place
    place = place.parent if place.name == "wandb" else place
    return place if (place / IDENTITY_FILE).is_file() else folder


def choose(
    config: TrackingConfig, *, found: Identity | None, saved: Identity | None, rows: int, resumes: bool
) -> Identity:
    """
    Return the run that this attempt belongs to: `found` in the folder, `saved` in the checkpoint, or a new one.

    `rows` are those that the checkpoint has counted; a run that begins there has none of them. Raises ConfigError.
    """
    known = _known(found, saved, rows) if resumes else None
    if config.wandb_fork and known is None:
        raise ConfigError("--wandb_fork: there is no run to fork; it goes with --resume_from_checkpoint of one in W&B.")
    asked = config.wandb_run_id
    if known is None:
        return Identity(run_id=asked or new_run_id(), first_row=rows, first_step=None if asked else 0)
    is_fork_begun = known is found and known.forked_from is not None
    if config.wandb_fork and not is_fork_begun:
        group = config.wandb_run_group or known.group or known.run_id
        new_id = asked if asked not in (None, known.run_id) else None
        return Identity(
            run_id=new_id or new_run_id(),
            group=group,
            first_row=rows,
            first_step=None if new_id else 0,
            forked_from=known.run_id,
        )
    if asked not in (None, known.run_id):
        return Identity(run_id=str(asked), first_row=rows, forked_from=known.run_id)
    name, is_elsewhere = asked_name(config), known is not found
    if is_elsewhere and asked is None and name and known.name not in (None, name):
        logger.warning(
            "The checkpoint is of the W&B run %s, called %s, and lies elsewhere: %s is a new run. "
            "To go on with that one, give --wandb_run_id %s.",
            *(known.run_id, known.name or "by W&B", name, known.run_id),
        )
        return Identity(run_id=new_run_id(), first_row=rows, first_step=0, forked_from=known.run_id)
    for flag, given, own in (
        ("wandb_project", config.wandb_project, known.project),
        ("wandb_entity", config.wandb_entity, known.entity),
    ):
        if given and own and given != own:
            raise ConfigError(
                f"--{flag}={given}, but the run that goes on, {known.run_id}, is in {own}: leave the flag out, or give "
                "--wandb_fork for a new run."
            )
    return known


def asked_name(config: TrackingConfig) -> str:
    """Return what the run is asked to be called by, "" if by nothing: W&B then makes a name up, or keeps it."""
    return config.run_name or os.environ.get("WANDB_NAME") or ""


def named(identity: Identity, config: TrackingConfig, output_dir: Path) -> Identity:
    """
    Return the run with its name and that of its artifacts: what this attempt asks for, else what they were before.

    A run that is called like its folder has a path for a name: its artifacts take its id, as the Trainer's do.
    """
    name = asked_name(config)
    before = "" if identity.name is None and not identity.mode else identity.name  # one that is not opened yet is new
    if identity.artifacts and (config.run_name is None or name == before):
        return replace(identity, name=name or before)
    artifacts = identity.run_id if config.run_name in (None, "", str(output_dir)) else str(config.run_name)
    if identity.artifacts:
        logger.info("The run %s is called %s from here on, as are its artifacts.", identity.run_id, artifacts)
    return replace(identity, name=name or before, artifacts=artifacts)


def _known(found: Identity | None, saved: Identity | None, rows: int) -> Identity | None:
    """Return the folder's, which is newer than the checkpoint's, unless the checkpoint is of another training."""
    if found is None or saved is None:
        return found or saved
    is_same = found.run_id == saved.run_id or (found.forked_from == saved.run_id and found.first_row <= rows)
    return found if is_same else saved
