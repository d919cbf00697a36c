"""The folder of a run: choose it, list its checkpoints, and find the one to resume from."""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
import uuid
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from harness.agent import SweepRun
from harness.checkpoint.flags import CheckpointConfig
from harness.checkpoint.layout import step_of, why_invalid
from harness.errors import ConfigError
from harness.files import CHUNK_BYTES
from harness.slurm import SlurmJob
from harness.training.state import TRAINER_STATE_FILE

MOST_LETTERS_OF_NAME = 50  # each takes up to 4 of the 255 bytes that a file system gives a name
FOLDER = re.compile(r"checkpoint-(\d+)(\.replaced)?")
LEFTOVER = re.compile(r"(checkpoint-\d+|download)(\.[0-9a-f]+)?\.partial")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint to resume from, why newer ones were passed over, and the W&B artifact that it came from, if any."""

    path: Path | None
    passed_over: tuple[str, ...] = ()
    artifact: str | None = None

    @property
    def is_there(self) -> bool:
        """Whether there is one, though it may still be in W&B."""
        return self.path is not None or self.artifact is not None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """
    Return the folders checkpoint-N, oldest first, without leftovers of saves that did not finish.

    A save that was killed while it replaced checkpoint-N leaves the older one as checkpoint-N.replaced.
    """
    if not output_dir.is_dir():
        return []
    found = {path.name: path for path in output_dir.iterdir() if path.is_dir() and FOLDER.fullmatch(path.name)}
    present = [path for name, path in found.items() if name.removesuffix(".replaced") not in found.keys() - {name}]
    return sorted(present, key=step_of)


def remove_leftovers(output_dir: Path) -> list[str]:
    """
    Delete what killed saves and downloads have left, and return the names. No process may be writing to the folder.

    A checkpoint-N.replaced without a checkpoint-N stays: it is the only checkpoint of its step.
    """
    if not output_dir.is_dir():
        return []
    left = [path for path in output_dir.iterdir() if path.is_dir() and LEFTOVER.fullmatch(path.name)]
    left += [path for path in output_dir.glob("checkpoint-*.replaced") if path.with_suffix("").is_dir()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in left if not path.exists())


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, under a leftover's name, which a kill leaves and nothing takes. Raises OSError."""
    if checkpoint.is_symlink():
        raise OSError(f"{checkpoint} is a link to {checkpoint.resolve()}")
    leftover = checkpoint.with_name(f"checkpoint-{step_of(checkpoint)}.{uuid.uuid4().hex[:8]}.partial")
    checkpoint.rename(leftover)
    shutil.rmtree(leftover)


def in_sweep(config: CheckpointConfig, sweep: SweepRun) -> CheckpointConfig:
    """Return what holds for a run of a W&B sweep: a folder of its own, and its newest checkpoint if there is one."""
    if config.output_dir is not None:
        return config
    resume = config.resume_from_checkpoint
    return replace(
        config, output_dir=str(sweep.output_dir), resume_from_checkpoint="auto" if resume is None else resume
    )


def in_job(config: CheckpointConfig, job: SlurmJob) -> CheckpointConfig:
    """Return what holds in a SLURM job: a folder of its own and, once it was requeued, its newest checkpoint."""
    if config.output_dir is None and job.is_batch:
        config = replace(config, output_dir=str(job.output_dir))
    resume = config.resume_from_checkpoint
    if job.restart_count == 0 or config.output_dir is None or resume in ("true", "auto", "false"):
        return config
    # A checkpoint of another run is where the first attempt began, not where the next one goes on.
    if resume is not None and not list_checkpoints(Path(config.output_dir).expanduser()):
        return config
    return replace(config, resume_from_checkpoint="auto")


def find(config: CheckpointConfig, output_dir: Path | None) -> Found:
    """
    Local: return the checkpoint that `--resume_from_checkpoint` means.

    Raises ConfigError where one is required and there is none: `true`, or a path that holds no whole checkpoint.
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


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint that a training can resume from, None if there is none. Reads every file of it."""
    found = reversed(list_checkpoints(Path(output_dir).expanduser()))
    return next((path for path in found if why_invalid(path) is None), None)


def choose_output_dir(config: CheckpointConfig, run_name: str | None = None) -> Path:
    """Return the folder of the run: as given, or a new one named by the time and the run's name."""
    if config.output_dir is not None:
        return Path(config.output_dir).expanduser()
    suffix = re.sub(r"[^\w.-]+", "-", run_name or "").strip("-.")[:MOST_LETTERS_OF_NAME]
    name = datetime.now().strftime("%Y%m%d-%H%M%S") + (f"-{suffix}" if suffix else "")
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
        # Only writing shows a full or read-only disk; permissions do not.
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0" * CHUNK_BYTES)
    except OSError as error:
        raise ConfigError(f"--output_dir={output_dir} can't be written to: {error}. Choose another folder.") from error
