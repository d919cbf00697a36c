"""The Trainer's layout of a checkpoint's folder: file names, the check that it is whole, and reading it."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from harness.checkpoint import schema
from harness.checkpoint.arrays import IN_PLACE_OF_NUMPY, with_arrays
from harness.checkpoint.manifest import FORMAT_VERSION, OWN_DIGEST, STATE_FILE, digest_of_manifest
from harness.distributed.backend import OPTIMIZER_FILE
from harness.distributed.optimizer_shards import OPTIMIZER_FILES, check_optimizer_file, read_shard
from harness.distributed.zero import shards_of
from harness.errors import ConfigError
from harness.files import digest_of, load_safely
from harness.model.weights import check_safetensors, is_inside, weights_files
from harness.training.state import TRAINER_STATE_FILE

WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
SCHEDULER_FILE, SCALER_FILE = "scheduler.pt", "scaler.pt"
NAMED = re.compile(r"checkpoint-(\d+)(\.replaced)?")
# What from_pretrained reads without executing code: no pickles, no Python files.
OF_A_MODEL = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md", ".bpe", ".spm", ".tiktoken", ".vocab")
# What a resume reads beside it, of any number of ranks; `metrics.jsonl` has the rows.
OF_A_RESUME = re.compile(
    rf"{re.escape(OPTIMIZER_FILE)}|optimizer_rank_\d+\.pt|{SCHEDULER_FILE}|{SCALER_FILE}|rng_state(_\d+)?\.pth|latest"
    r"|metrics\.jsonl|global_step(?P<step>\d+)/[^/]+_(model|optim)_states\.pt"
)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of a folder checkpoint-N or checkpoint-N.replaced."""
    return int(checkpoint.name.removesuffix(".replaced").rpartition("-")[2])


def rng_file(process_index: int, num_processes: int) -> str:
    """Return the name that the Trainer gives the file of a rank's generators."""
    return "rng_state.pth" if num_processes == 1 else f"rng_state_{process_index}.pth"


def is_read(name: str, step: int | None = None) -> bool:
    """Whether a file of this name (with slashes) is read of a checkpoint; `step`: and belongs to that one's step."""
    if (found := OF_A_RESUME.fullmatch(name)) is not None:
        return None in (step, found["step"]) or int(found["step"][:18]) == step
    folder, _, file = name.rpartition("/")
    return folder in ("", "additional_chat_templates") and file.endswith(OF_A_MODEL)


def why_invalid(path: Path) -> str | None:
    """
    Return why a folder can't be resumed from; None if it can.

    Reads every file to compare digests, or where a Trainer's checkpoint has none the checksums in its files; and what
    is small as `read` does. Whether it is of this run's model only a resume can tell.
    """
    if not path.is_dir():
        return "no such folder"
    if not (path / TRAINER_STATE_FILE).is_file():
        return f"{TRAINER_STATE_FILE} is missing, so it is no checkpoint or was never finished"
    manifest = path / STATE_FILE
    if not manifest.is_file():
        # A Trainer's checkpoint has no manifest: check at least that the files for a resume exist.
        needed = (WEIGHTS, (OPTIMIZER_FILE,), (SCHEDULER_FILE,))
        missing = [names[0] for names in needed if not any((path / name).is_file() for name in names)]
        if missing:
            return f"{', '.join(missing)} missing (saved with save_only_model, or never finished)"
    fault = why_damaged(path) if manifest.is_file() else _why_torn(path)
    if fault is not None:
        return fault
    try:
        if manifest.is_file() and schema.read_json(manifest).get("only_model"):
            return "it was saved with --save_only_model; use it as --model_name_or_path"
        _check_content(path)
    except ConfigError as error:
        return str(error)
    return None


def _check_content(path: Path) -> None:
    """Raise ConfigError for what no resume could use: of another shape than it has, or pointing out of the folder."""
    _counters_and_manifest(path)
    for name in (OPTIMIZER_FILE, SCHEDULER_FILE, SCALER_FILE):
        if (path / name).is_file():
            _state(path / name)
    is_ours = [isinstance(_state(file).get("harness"), dict) for file in _rng_files(path)]
    if any(is_ours) and not (path / STATE_FILE).is_file():
        raise ConfigError(f"{STATE_FILE} is missing, so it was never finished")
    for file in path.glob(OPTIMIZER_FILES):
        read_shard(file)
    shards_of(path)
    for name in weights_files(path):
        check_safetensors(path / name)


def _why_torn(path: Path) -> str | None:
    """Return which of a Trainer's files is damaged, by the checksums that torch's files have inside; None if none."""
    for file in (path / OPTIMIZER_FILE, path / SCHEDULER_FILE, path / SCALER_FILE, *_rng_files(path)):
        try:
            if file.is_file() and zipfile.is_zipfile(file):  # torch's older format has no checksums
                with zipfile.ZipFile(file) as parts:
                    if (part := parts.testzip()) is not None:
                        return f"{file.name} is damaged: the checksum of {part} differs"
        except (OSError, ValueError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile) as error:
            return f"{file.name} is damaged: {error}"
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
        if content.get(OWN_DIGEST, digest_of_manifest(content)) != digest_of_manifest(content):
            return f"{STATE_FILE} is damaged: its digest of itself differs"
        listed = {name: (int(facts["size"]), str(facts["sha256"])) for name, facts in content["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        return f"{STATE_FILE} can't be read: {type(error).__name__} {error}"
    if outside := [name for name in listed if not is_inside(name)]:
        return f"{STATE_FILE} lists {outside[0]!r}, which is not in the folder"
    # Other files, the code of a model among them, stay behind where a checkpoint is brought from elsewhere.
    listed = {name: facts for name, facts in listed.items() if is_read(name) or (path / name).exists()}
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

    Raises ConfigError if a file can't be read, or holds anything else than it should.
    """
    shared = _counters_and_manifest(path)
    # On the device it would be there twice, and the step counts would stay there that AdamW reads on the host.
    names = (OPTIMIZER_FILE, SCHEDULER_FILE, SCALER_FILE)
    files = {name: _state(path / name) for name in names if (path / name).is_file()}
    own = path / rng_file(*ranks)
    is_same_number = shared.get("world_size", ranks[1]) == ranks[1] and own.is_file()
    states = tuple(_state(file) for file in ([own] if is_same_number else _rng_files(path)))
    return Saved(
        path=path,
        files=files,
        rank_state=states[ranks[0] % len(states)] if states else None,
        other_ranks=() if is_same_number else states,
        shared=shared,
    )


def _counters_and_manifest(path: Path) -> dict[str, Any]:
    """Check trainer_state.json and our manifest, and return the latter, {} of a Trainer's. Raises ConfigError."""
    counters = schema.read_json(path / TRAINER_STATE_FILE)
    schema.check_counters(TRAINER_STATE_FILE, counters)
    step, manifest = counters["global_step"], path / STATE_FILE
    if (named := NAMED.fullmatch(path.name)) is not None and int(named[1]) != step:
        raise ConfigError(f"{TRAINER_STATE_FILE} is of step {step}, the folder of step {named[1]}")
    if not manifest.is_file():
        return {}
    shared: dict[str, Any] = schema.read_json(manifest)
    schema.check_manifest(STATE_FILE, shared, step=step)
    return shared


def _rng_files(path: Path) -> list[Path]:
    """Return the files of all ranks that saved, in rank order."""
    alone = path / rng_file(0, 1)
    return [alone] if alone.is_file() else sorted(path.glob("rng_state_*.pth"), key=lambda file: (len(file.name), file))


CHECKS = {
    OPTIMIZER_FILE: check_optimizer_file,
    SCHEDULER_FILE: schema.check_schedule,
    SCALER_FILE: schema.check_scaler,
}


def _state(file: Path) -> Any:
    """Return what one of torch's files holds. Raises ConfigError unless it is what the file is for."""
    content = load_safely(file, "cpu", IN_PLACE_OF_NUMPY, mmap=file.name == OPTIMIZER_FILE)
    try:
        content = with_arrays(content)
    except ConfigError as error:
        raise ConfigError(f"{file.name} can't be loaded safely: {error}") from error
    CHECKS.get(file.name, schema.check_rank_state)(file.name, content)
    return content
