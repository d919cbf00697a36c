"""Checkpoints in the Trainer's layout: where they are, which are whole, what is in them."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from harness.checkpoint.flags import CheckpointConfig
from harness.errors import ConfigError
from harness.files import CHUNK_BYTES, digest_of, load_safely
from harness.training.state import TRAINER_STATE_FILE

STATE_FILE = "harness_state.json"
FORMAT_VERSION = 1
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
FOLDER = re.compile(r"checkpoint-(\d+)(\.replaced)?")
LEFTOVER = re.compile(r"(checkpoint-\d+|download)(\.[0-9a-f]+)?\.partial")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint to go on from, why newer ones were passed over, and the artifact in W&B that it is, if it is one."""

    path: Path | None
    passed_over: tuple[str, ...] = ()
    artifact: str | None = None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """
    The folders checkpoint-N, oldest first; no leftovers of a save that did not end.

    A save that was killed while it replaced checkpoint-N leaves the older one as checkpoint-N.replaced.
    """
    if not output_dir.is_dir():
        return []
    found = {path.name: path for path in output_dir.iterdir() if path.is_dir() and FOLDER.fullmatch(path.name)}
    present = [path for name, path in found.items() if name.removesuffix(".replaced") not in found.keys() - {name}]
    return sorted(present, key=lambda path: int(path.name.removesuffix(".replaced").rpartition("-")[2]))


def remove_leftovers(output_dir: Path) -> list[str]:
    """
    Delete what dead writers' saves and downloads have left, and return the names. Nobody may be writing to the folder.

    A checkpoint that a kill left as checkpoint-N.replaced alone stays: it is the only one of its step.
    """
    if not output_dir.is_dir():
        return []
    left = [path for path in output_dir.iterdir() if path.is_dir() and LEFTOVER.fullmatch(path.name)]
    left += [path for path in output_dir.glob("checkpoint-*.replaced") if path.with_suffix("").is_dir()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in left if not path.exists())


def find(config: CheckpointConfig, output_dir: Path | None) -> Found:
    """
    Local: the checkpoint that `--resume_from_checkpoint` means.

    Raises ConfigError where there must be one and is none: `true`, or a path that holds no whole checkpoint.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None or not config.resumes:
        return Found(path=None)
    if wanted not in ("true", "auto"):
        path = Path(wanted).expanduser()
        if (fault := why_invalid(path)) is not None:
            raise ConfigError(f"--resume_from_checkpoint={wanted}: {fault}.")
        return Found(path=path)
    passed_over: list[str] = []
    for path in reversed(list_checkpoints(output_dir or Path())):
        if (fault := why_invalid(path)) is None:
            return Found(path=path, passed_over=tuple(passed_over))
        passed_over.append(f"{path.name}: {fault}")
    if wanted == "true":
        reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise ConfigError(
            f"--resume_from_checkpoint=true: no whole checkpoint in {output_dir}{reasons}; "
            "use auto to start afresh where there is none."
        )
    if passed_over:
        raise ConfigError(
            f"--resume_from_checkpoint=auto: no checkpoint in {output_dir} is whole ({'; '.join(passed_over)}); "
            "move or delete them to start afresh."
        )
    return Found(path=None)


def choose_output_dir(config: CheckpointConfig) -> Path:
    """The folder of the run: as given, or a fresh one named by the time."""
    if config.output_dir is not None:
        return Path(config.output_dir).expanduser()
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    candidates = (Path("runs") / (f"{name}-{i}" if i else name) for i in itertools.count())
    return next(path for path in candidates if not path.exists())


def check_output_dir(output_dir: Path, *, may_hold_run: bool) -> None:
    """Raise ConfigError if the folder holds another run, or can't be written to. Leaves nothing behind."""
    holds_run = bool(list_checkpoints(output_dir)) or (output_dir / TRAINER_STATE_FILE).is_file()
    if holds_run and not may_hold_run:
        raise ConfigError(
            f"--output_dir={output_dir} holds another run: go on with it by --resume_from_checkpoint true, "
            "or take another folder, or delete it."
        )
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    try:
        # Asking for permissions says nothing on a full or read-only disk.
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0" * CHUNK_BYTES)
    except OSError as error:
        raise ConfigError(f"--output_dir={output_dir} can't be written to: {error}. Choose another folder.") from error


def describe_change(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between the values a position was counted in and today's; empty if nothing does."""
    position = ("epoch", "batches")
    return ", ".join(
        f"{name} {saved[name]} (now {now[name]})"
        for name in now
        if name not in position and name in saved and saved[name] != now[name]
    )


def why_invalid(path: Path) -> str | None:
    """What keeps a folder from being resumed; None if nothing does. Reads all of it, to compare digests."""
    if not path.is_dir():
        return "no such folder"
    if not (path / TRAINER_STATE_FILE).is_file():
        return f"{TRAINER_STATE_FILE} is missing, so it is no checkpoint or was never finished"
    manifest = path / STATE_FILE
    if not manifest.is_file():
        # A Trainer's: it has no manifest, so what a resume needs must at least be there.
        needed = (WEIGHTS, ("optimizer.pt",), ("scheduler.pt",))
        missing = [names[0] for names in needed if not any((path / name).is_file() for name in names)]
        return f"{', '.join(missing)} missing (saved with save_only_model, or never finished)" if missing else None
    if (fault := why_damaged(path)) is not None:
        return fault
    if json.loads(manifest.read_text(encoding="utf-8")).get("only_model"):
        return "it was saved with --save_only_model; use it as --model_name_or_path"
    return None


def why_damaged(path: Path) -> str | None:
    """What in a folder differs from its manifest; None if nothing does, or if there is none. Reads all of it."""
    manifest = path / STATE_FILE
    if not manifest.is_file():
        return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        version = int(content.get("format_version", 0))
        if version > FORMAT_VERSION:
            return f"{STATE_FILE} has format {version}, this version reads up to {FORMAT_VERSION}"
        listed = {name: (int(facts["size"]), str(facts["sha256"])) for name, facts in content["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{STATE_FILE} can't be read: {type(error).__name__} {error}"
    faults = (_why_damaged(path / name, *facts) for name, facts in listed.items())
    return next((fault for fault in faults if fault is not None), None)


def _why_damaged(file: Path, size: int, digest: str) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != size:
        return f"{file.name} has {file.stat().st_size} bytes instead of {size}"
    return f"{file.name} is damaged: its digest differs" if digest_of(file) != digest else None


@dataclass(frozen=True, kw_only=True)
class Saved:
    """
    A checkpoint that has been read: torch states by file name, this rank's state, and our JSON (or {}).

    If another number of ranks saved it, `other_ranks` holds the states of them all, and `rank_state` is the one that
    this rank goes on from: that of its own number, or counted round from rank zero's again.
    """

    path: Path
    files: dict[str, Any]
    rank_state: dict[str, Any] | None
    other_ranks: tuple[dict[str, Any], ...] = ()
    shared: dict[str, Any]


def read(path: Path, *, ranks: tuple[int, int], device: torch.device) -> Saved:
    """
    Local: read a checkpoint, ours or a Trainer's; nothing is unpickled but tensors and plain values.

    Raises ConfigError if a file holds anything else or can't be read.
    """
    # As the Trainer: on one device through the CPU, so that two copies of the optimizer never fill it.
    where = device if ranks[1] > 1 and device.type != "cpu" else torch.device("cpu")
    files = {
        name: _load(path / name, where)
        for name in ("optimizer.pt", "scheduler.pt", "scaler.pt")
        if (path / name).is_file()
    }
    manifest = path / STATE_FILE
    shared = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    own = path / rng_file(*ranks)
    is_same_number = shared.get("world_size", ranks[1]) == ranks[1] and own.is_file()
    states = tuple(_load(file, torch.device("cpu")) for file in ([own] if is_same_number else _rng_files(path)))
    return Saved(
        path=path,
        files=files,
        rank_state=states[ranks[0] % len(states)] if states else None,
        other_ranks=() if is_same_number else states,
        shared=shared,
    )


def _rng_files(path: Path) -> list[Path]:
    """The files of all ranks that saved, in their order."""
    alone = path / rng_file(0, 1)
    return [alone] if alone.is_file() else sorted(path.glob("rng_state_*.pth"), key=lambda file: (len(file.name), file))


def rng_file(process_index: int, num_processes: int) -> str:
    """The name that the Trainer gives a rank's generators."""
    return "rng_state.pth" if num_processes == 1 else f"rng_state_{process_index}.pth"


def _load(path: Path, device: torch.device) -> Any:
    # The Trainer's rng_state.pth holds numpy's state as an array.
    arrays = [np.ndarray, np.dtype, np._core.multiarray._reconstruct, type(np.dtype(np.uint32))]  # type: ignore[attr-defined]
    return load_safely(path, device, arrays)
