"""Open a study by its name or its folder, as its first start has left it."""

from __future__ import annotations

from pathlib import Path

from harness.errors import ConfigError
from harness.masking import is_masked, masked
from harness.sweep.spec import spec_of
from harness.sweep.storage import open_storage, patiently
from harness.sweep.study import FOLDER, SWEEP, Sweep, read_study_file


def folder_of(study: str) -> Path:
    """Return the folder of a study that is given by its name or its folder. Raises ConfigError."""
    given = Path(study).expanduser()
    return given if given.is_dir() else Path("runs") / study


def storage_of(folder: Path) -> str | None:
    """Return where the study of a folder is kept; None if there is none, or if a password is not written down."""
    try:
        found = str(read_study_file(folder)["storage"])
    except (ConfigError, KeyError):
        return None
    return None if is_masked(found) else found.replace(FOLDER, str(folder))


def recalled(study: str, storage: str | None) -> Sweep:
    """Return the sweep of a study. Raises ConfigError."""
    folder = folder_of(study)
    facts = read_study_file(folder)
    kept_in, name = storage or storage_of(folder), str(facts.get("name"))
    if kept_in is None:
        raise ConfigError(f"The study {name} is in a storage whose password is not written down: give --storage.")
    opened = open_storage(kept_in)
    try:
        attributes = patiently(lambda: opened.get_study_user_attrs(opened.get_study_id_from_name(name)))
        raw = dict(attributes[SWEEP])
    except KeyError:
        raise ConfigError(f"--storage={masked(kept_in)} has no study {name}: it was moved, or deleted.") from None
    arguments, seed = raw.pop("flags", {}), int(raw.pop("seed", 0))
    return Sweep(
        spec=spec_of(raw, name=name),
        name=name,
        folder=folder,
        storage=kept_in,
        count=0,
        seed=seed,
        flags=[str(flag) for flag in facts.get("flags", [])],
        arguments=arguments,
    )
