"""Bring what a run starts from out of W&B: a checkpoint to resume, or a model, config or tokenizer."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.checkpoint.find import Found, check_output_dir, choose_output_dir, find, list_checkpoints
from harness.checkpoint.layout import OF_A_MODEL, WEIGHTS, is_read, step_of, why_invalid
from harness.checkpoint.lock import Lock
from harness.checkpoint.manifest import STATE_FILE
from harness.errors import ConfigError
from harness.files import put_in_place, sync
from harness.flags import Config
from harness.tasks.flags import TaskConfig
from harness.tracking.artifacts.download import (
    PREFIX,
    bring,
    download,
    find_artifact,
    is_artifact,
    is_there,
    place_of,
    sibling,
)
from harness.tracking.artifacts.download import step_of as alias_of_step
from harness.tracking.client import one_line
from harness.tracking.damage import is_count, read_json
from harness.tracking.flags import TrackingConfig
from harness.tracking.folders import check_folders
from harness.tracking.run import identity
from harness.training.state import TRAINER_STATE_FILE

logger = logging.getLogger(__name__)

RESUME = "resume_from_checkpoint"
SECONDS_TO_ANSWER = 5.0
NAMES_SAID = 3
FROM_PRETRAINED = ("model_name_or_path", "config_name", "tokenizer_name", "image_processor_name")


class Beginning:
    """
    Rank zero: what a run goes on from, and the folder that it writes to.

    Both are looked for before anything is loaded, so that a mistake is told at once. The folder is taken over when the
    arguments are known to be good: a run that is refused must not end one that is going on there.
    """

    def __init__(self, config: Config, lock: Lock) -> None:
        self.config, self.lock = config, lock
        self._output_dir, self._found = Path(), Found(path=None)
        self._artifact: Any = None
        self._listed: list[tuple[Path, int]] = []

    def is_free(self) -> bool:
        """
        Whether the folder may be taken; False: that is not known yet, ask again.

        It answers within some seconds, since other ranks wait for it with a limit. Raises ConfigError if it is in use.
        """
        if self._output_dir == Path():
            self._output_dir = choose_output_dir(self.config.checkpoint, self.config.tracking.run_name)
        try:
            return not self._takes or self.lock.check(self._output_dir, seconds=SECONDS_TO_ANSWER)
        except OSError as error:
            raise ConfigError(f"--output_dir={self._output_dir} can't be read: {error}.") from error

    def look(self) -> tuple[Found, Path]:
        """Return the checkpoint and the folder, without writing. Raises ConfigError."""
        config, output_dir = self.config, self._output_dir
        if config.tracking.sends:
            check_folders(config.tracking.wandb_dir)
        self._artifact = find_checkpoint(config, output_dir)
        self._listed = _identities(output_dir)
        if self._artifact is None:
            self._found = find(config.checkpoint, output_dir)
        else:
            self._found = Found(path=None, artifact=self._artifact.qualified_name)
        check_output_dir(output_dir, may_hold_run=self._found.is_there or not config.run.trains)
        return self._found, output_dir

    def claim(self, accepts: Callable[[Path], None]) -> Found:
        """
        Take the folder, if it is there, and return the checkpoint: downloaded, or a newer one that was put there since.

        `accepts` raises ConfigError for a checkpoint that the run can't go on from; nothing is taken then.
        """
        config, output_dir = self.config, self._output_dir
        if self._found.path is not None:
            accepts(self._found.path)
        try:
            if self._artifact is not None:
                output_dir.mkdir(parents=True, exist_ok=True)
            if self._takes:
                self.lock.take(output_dir)
        except OSError as error:
            raise ConfigError(f"--output_dir={output_dir} can't be written to: {error}.") from error
        if self._artifact is not None:
            return bring_checkpoint(config, self._artifact, output_dir, token=self.lock.token)
        return self._found if _identities(output_dir) == self._listed else find(config.checkpoint, output_dir)

    @property
    def _takes(self) -> bool:
        return self.config.run.trains and self.config.checkpoint.resumes and self._output_dir.is_dir()


def _identities(output_dir: Path) -> list[tuple[Path, int]]:
    return [(path, path.stat().st_ino) for path in list_checkpoints(output_dir)]


def find_checkpoint(config: Config, output_dir: Path) -> Any:
    """Rank zero: return the artifact that --resume_from_checkpoint names, None for a path. Raises ConfigError."""
    path = config.checkpoint.resume_from_checkpoint
    if path is None or not is_artifact(path):
        return None
    artifact = find_artifact(RESUME, path, config.tracking, run=identity.read(output_dir))
    if TRAINER_STATE_FILE not in artifact.manifest.entries:
        raise ConfigError(
            f"--{RESUME}: {artifact.qualified_name} is no checkpoint that can be resumed: {TRAINER_STATE_FILE} is "
            "missing, so it is no checkpoint or was never finished."
        )
    return artifact


def bring_checkpoint(config: Config, artifact: Any, output_dir: Path, *, token: str) -> Found:
    """
    Rank zero: put the artifact as a folder into output_dir, which exists and is locked by us; whole or not at all.

    A folder that is there already is not downloaded again. Where the path means the newest checkpoint, a newer one of
    the same run in output_dir is taken instead. With --load_best_model_at_end the best checkpoint comes too. `token` is
    unique to this process. Raises ConfigError.
    """
    path = str(config.checkpoint.resume_from_checkpoint).removeprefix(PREFIX)
    if path.partition(":")[2] in ("", "latest") and (newer := _newer_here(config, artifact, output_dir)) is not None:
        logger.info("Taking %s: it is of the same run as %s, and newer.", newer.path, artifact.qualified_name)
        return newer
    folder = _bring(artifact, output_dir, token)
    best = json.loads((folder / TRAINER_STATE_FILE).read_text(encoding="utf-8")).get("best_global_step")
    if (
        config.best.load_best_model_at_end
        and is_count(best)
        and best
        and not (output_dir / f"checkpoint-{best}").is_dir()
    ):
        version = sibling(RESUME, artifact, f"checkpoint_global_step_{best}")
        if version is not None:
            _bring(version, output_dir, token)
    return Found(path=folder, artifact=artifact.qualified_name)


def _newer_here(config: Config, artifact: Any, output_dir: Path) -> Found | None:
    """Return the newest whole checkpoint in output_dir, if it is of the artifact's run and of a later step."""
    checkpoint = replace(config.checkpoint, resume_from_checkpoint="auto", output_dir=str(output_dir))
    try:
        here = find(checkpoint, output_dir)
    except ConfigError:  # there are checkpoints, but none is whole
        return None
    if here.path is None or not _is_same_run(artifact, here.path):
        return None
    return here if step_of(here.path) > (alias_of_step(artifact) or 0) else None


def _bring(artifact: Any, output_dir: Path, token: str) -> Path:
    """
    Return the folder checkpoint-N with those of the artifact's files that a resume reads, all of them verified.

    They are downloaded if need be; what else is in the artifact stays in W&B.
    """
    name, present = artifact.qualified_name, list(artifact.manifest.entries)
    for path in list_checkpoints(output_dir):
        step, wanted = step_of(path), _read_of(present, step_of(path))
        if alias_of_step(artifact) in (None, step) and is_there(artifact, path, wanted) and why_invalid(path) is None:
            return path
    partial = output_dir / f"download.{token}.partial"
    logger.info("Downloading %s (%.1f MB) to %s.", name, artifact.size / 1e6, output_dir)
    try:
        partial.mkdir()
        download(RESUME, artifact, partial, [each for each in present if each == TRAINER_STATE_FILE])
        step = _step_in(partial, name)
        wanted = _read_of(present, step)
        download(RESUME, artifact, partial, wanted)
        _say_left(name, [each for each in present if each not in wanted])
        if (fault := why_invalid(partial)) is not None:
            raise ConfigError(f"--{RESUME}: {name} is no checkpoint that can be resumed: {fault}.")
        final = output_dir / f"checkpoint-{step}"
        if final.is_dir() and why_invalid(final) is None and not _is_same_run(artifact, final):
            raise ConfigError(
                f"--{RESUME}: {final} is there and of another run than {name}; take another --output_dir."
            )
        for file in (*(path for path in partial.rglob("*") if path.is_file()), partial):
            sync(file)
        put_in_place(partial, final)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--{RESUME}: {name} could not be put into {output_dir}: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _read_of(names: Sequence[str], step: int) -> list[str]:
    """Return those files that are read of a checkpoint of this step."""
    return [name for name in names if is_read(name, step)]


def _step_in(folder: Path, name: str) -> int:
    """Return the step of a checkpoint whose state has been downloaded. Raises ConfigError if it says none."""
    try:
        content = read_json(folder / TRAINER_STATE_FILE)
        step = content["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--{RESUME}: {name}: {TRAINER_STATE_FILE} can't be read: {one_line(error)}.") from error
    if not is_count(step):
        raise ConfigError(f"--{RESUME}: {name}: {TRAINER_STATE_FILE} says global_step {step!r:.40}, which is no step.")
    return int(step)


def _say_left(name: str, left: Sequence[str]) -> None:
    if left:
        more = f" and {len(left) - NAMES_SAID} more" if len(left) > NAMES_SAID else ""
        logger.info("%s: a resume does not read %s%s: left in W&B.", name, ", ".join(left[:NAMES_SAID]), more)


def _is_same_run(artifact: Any, checkpoint: Path) -> bool:
    manifest = checkpoint / STATE_FILE
    try:
        content = read_json(manifest) if manifest.is_file() else {}
        run_id = (content.get("tracking", {}).get("run") or {}).get("run_id")
    except (OSError, ValueError, AttributeError):  # damaged: whose it is is not known
        return False
    return run_id is not None and run_id == artifact.metadata.get("run_id")


def models_from_wandb(config: TaskConfig, tracking: TrackingConfig) -> tuple[TaskConfig, tuple[str, ...]]:
    """
    Local, once a node at a time: return the flags with folders in place of `wandb:` paths, and the versions used.

    Files that are there already are not downloaded again; pickles and code stay in W&B. Raises ConfigError.
    """
    folders: dict[str, Any] = {}
    used: list[str] = []
    for flag in FROM_PRETRAINED:
        path = getattr(config, flag)
        if not is_artifact(path):
            continue
        artifact = find_artifact(flag, path, tracking)
        names = [name for name in artifact.manifest.entries if name.endswith(OF_A_MODEL)]
        if flag == "model_name_or_path" and not any(name in WEIGHTS for name in names):
            raise ConfigError(
                f"--{flag}={path}: {artifact.qualified_name} holds no safetensors weights but "
                f"{', '.join(sorted(artifact.manifest.entries)) or 'nothing'}; pickled ones are not loaded."
            )
        folder = place_of(artifact)
        bring(flag, artifact, folder, names)
        used.append(artifact.qualified_name)
        folders[flag] = os.fspath(folder)
    return replace(config, **folders), tuple(dict.fromkeys(used))
