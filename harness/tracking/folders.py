"""The folders of W&B's own variables: a ~ is the home, and what can't be written to is told before a training."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from harness.config import at_home
from harness.errors import ConfigError

VARIABLES = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")


def expand_folders() -> None:
    """Put the home in place of a ~ in W&B's variables: wandb takes some of them as they stand."""
    for name in VARIABLES:
        if value := os.environ.get(name):
            os.environ[name] = at_home(value)


def check_folders(wandb_dir: str | None) -> None:
    """
    Raise ConfigError for folders that were chosen and can't be written to. Leaves nothing behind.

    wandb does without its cache and its settings; what is downloaded is checked when it is.
    """
    chosen = {
        "--wandb_dir (WANDB_DIR)": (wandb_dir, "W&B's files of a run"),
        "WANDB_DATA_DIR": (os.environ.get("WANDB_DATA_DIR"), "tables and artifacts on their way to W&B"),
    }
    faults = {name: _why_unwritable(Path(folder)) for name, (folder, _) in chosen.items() if folder}
    problems = [
        f"{name}={chosen[name][0]} can't hold {chosen[name][1]}: {fault}. Choose another folder, or leave it out."
        for name, fault in faults.items()
        if fault is not None
    ]
    if problems:
        raise ConfigError(*problems)


def _why_unwritable(folder: Path) -> str | None:
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            return f"{existing} is no folder"
        with tempfile.TemporaryFile(dir=existing):  # permissions do not show a read-only disk
            return None
    except OSError as error:
        return str(error)
