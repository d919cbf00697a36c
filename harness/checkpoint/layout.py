"""The Trainer's layout of a checkpoint's folder: file names, the check that it is whole, and reading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from harness.distributed.backend import OPTIMIZER_FILE
from harness.files import digest_of, load_safely
from harness.training.state import TRAINER_STATE_FILE

STATE_FILE = "harness_state.json"  # the manifest, written last: sizes and digests of the other files, and our own state
FORMAT_VERSION = 1
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
SCHEDULER_FILE, SCALER_FILE = "scheduler.pt", "scaler.pt"


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of a folder checkpoint-N or checkpoint-N.replaced."""
    return int(checkpoint.name.removesuffix(".replaced").rpartition("-")[2])


def rng_file(process_index: int, num_processes: int) -> str:
    """Return the name that the Trainer gives the file of a rank's generators."""
    return "rng_state.pth" if num_processes == 1 else f"rng_state_{process_index}.pth"


def manifest_of(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's manifest; {} if there is none or it is no such file."""
    try:
        content = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def why_invalid(path: Path) -> str | None:
    """Return why a folder can't be resumed from; None if it can. Reads every file to compare digests."""
    if not path.is_dir():
        return "no such folder"
    if not (path / TRAINER_STATE_FILE).is_file():
        return f"{TRAINER_STATE_FILE} is missing, so it is no checkpoint or was never finished"
    manifest = path / STATE_FILE
    if not manifest.is_file():
        # A Trainer's checkpoint has no manifest: check at least that the files for a resume exist.
        needed = (WEIGHTS, (OPTIMIZER_FILE,), (SCHEDULER_FILE,))
        missing = [names[0] for names in needed if not any((path / name).is_file() for name in names)]
        return f"{', '.join(missing)} missing (saved with save_only_model, or never finished)" if missing else None
    if (fault := why_damaged(path)) is not None:
        return fault
    if json.loads(manifest.read_text(encoding="utf-8")).get("only_model"):
        return "it was saved with --save_only_model; use it as --model_name_or_path"
    return None


def why_damaged(path: Path) -> str | None:
    """Return what differs from the folder's manifest; None if nothing does or there is none. Reads every file."""
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

    Tensors are on the CPU; those of the optimizer are memory-mapped, so who keeps one has to copy it.
    If another number of ranks saved it, `other_ranks` holds the states of all of them, and `rank_state` is the one that
    this rank takes: rank `i` takes that of rank `i` modulo their number.
    """

    path: Path
    files: dict[str, Any]
    rank_state: dict[str, Any] | None
    other_ranks: tuple[dict[str, Any], ...] = ()
    shared: dict[str, Any]

    @property
    def ours(self) -> dict[str, Any]:
        """This rank's own values beside its generators; {} for a Trainer's checkpoint."""
        found: dict[str, Any] = (self.rank_state or {}).get("harness", {})
        return found


def read(path: Path, *, ranks: tuple[int, int]) -> Saved:
    """
    Local: read a checkpoint, ours or a Trainer's; only tensors and plain values are unpickled.

    Raises ConfigError if a file holds anything else or can't be read.
    """
    # On the device it would be there twice, and the step counts would stay there that AdamW reads on the host.
    files = {
        name: _load(path / name, mmap=name == OPTIMIZER_FILE)
        for name in (OPTIMIZER_FILE, SCHEDULER_FILE, SCALER_FILE)
        if (path / name).is_file()
    }
    manifest = path / STATE_FILE
    shared = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    own = path / rng_file(*ranks)
    is_same_number = shared.get("world_size", ranks[1]) == ranks[1] and own.is_file()
    states = tuple(_load(file) for file in ([own] if is_same_number else _rng_files(path)))
    return Saved(
        path=path,
        files=files,
        rank_state=states[ranks[0] % len(states)] if states else None,
        other_ranks=() if is_same_number else states,
        shared=shared,
    )


def _rng_files(path: Path) -> list[Path]:
    """Return the files of all ranks that saved, in rank order."""
    alone = path / rng_file(0, 1)
    return [alone] if alone.is_file() else sorted(path.glob("rng_state_*.pth"), key=lambda file: (len(file.name), file))


def _load(path: Path, *, mmap: bool = False) -> Any:
    # The Trainer's rng_state.pth holds numpy's state as an array.
    arrays = [np.ndarray, np.dtype, np._core.multiarray._reconstruct, type(np.dtype(np.uint32))]  # type: ignore[attr-defined]
    return load_safely(path, "cpu", arrays, mmap=mmap)
