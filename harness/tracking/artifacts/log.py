"""WANDB_LOG_MODEL: checkpoints and models are uploaded in the background; the training only makes hard links."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config import plain
from harness.masking import masked
from harness.tracking.artifacts.queue import Pending, UploadResult, Uploads
from harness.tracking.artifacts.staging import STAGING_FOLDER, stage, sweep, waiting
from harness.tracking.client import one_line
from harness.tracking.flags import TrackingConfig

logger = logging.getLogger(__name__)

ARCHITECTURE_FILE = "model_architecture.txt"
LONGEST_SUFFIX = 128 - len("checkpoint-")  # W&B's limit for a name


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Version:
    """
    What becomes a version of a collection: files that are linked and texts that are written, by their names in it.

    `beside`: what the staged files are put beside; default: the output_dir. `saved_at`, in seconds since 1970, orders
    the versions; default: now.
    """

    collection: str
    aliases: list[str]
    metadata: Mapping[str, Any]
    what: str
    links: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: Path | None = None
    saved_at: float | None = None
    registry: str | None = None


class Artifacts:
    """
    The artifacts of one W&B run. Rank zero's; every method but `close` returns within milliseconds and never raises.

    - run: the open wandb run. config: what --wandb_log_model, --wandb_artifact_names, --wandb_keep_checkpoints,
      --wandb_registry and --wandb_finish_timeout say.
    - suffix: the run's name, or its id, that its collections are called by.
    - output_dir: where an earlier attempt may have left something; default: where wandb keeps its files.

    What is to be uploaded is hard-linked into the folder `wandb-artifacts` beside it, and stays there until W&B has
    confirmed it. `Uploads` says in what order it goes.
    """

    def __init__(self, run: Any, config: TrackingConfig, *, suffix: str, output_dir: Path | None = None) -> None:
        self._run, self._config = run, config
        self._output_dir = Path(run.settings.root_dir if output_dir is None else output_dir).absolute()
        name = _allowed(suffix, run.id)
        self._model = f"model-{name}"
        self._checkpoints = f"checkpoint-{name}" if config.wandb_artifact_names == "harness" else self._model
        self._uploads = Uploads(
            run, keep_checkpoints=config.wandb_keep_checkpoints, finish_timeout=config.wandb_finish_timeout
        )
        self._has_failed = self._has_copied = False
        self._result: UploadResult | None = None
        self._take_up()

    def log_architecture(self, text: str, *, metadata: Mapping[str, Any]) -> None:
        """Log the description of the model, the first version of its collection. Newer ones keep `latest`."""
        self._stage(
            _Version(
                collection=self._model,
                aliases=["base_model"],
                metadata=metadata,
                what="Architecture of the model",
                texts={ARCHITECTURE_FILE: text},
                saved_at=0.0,
            )
        )

    def log_checkpoint(
        self, folder: Path, *, step: int, epoch: float, is_best: bool, metadata: Mapping[str, Any]
    ) -> None:
        """Log all files of a whole checkpoint, if checkpoints are wanted. `folder` may be deleted afterwards."""
        if self._config.wandb_log_model != "checkpoint":
            return
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        self._stage(
            _Version(
                collection=self._checkpoints,
                aliases=[f"epoch_{round(epoch, 2)}", f"checkpoint_global_step_{step}", *(["best"] if is_best else [])],
                metadata=metadata,
                what=f"Checkpoint of step {step}",
                links={path.relative_to(folder).as_posix(): path for path in files},
                beside=folder,
            )
        )

    def log_model(self, files: Sequence[Path], *, architecture: str, metadata: Mapping[str, Any]) -> None:
        """Log the final model. Its files may be deleted or replaced afterwards, but not rewritten in place."""
        self._stage(
            _Version(
                collection=self._model,
                aliases=["final_model"],
                metadata=metadata,
                what="Final model",
                links={path.name: path for path in files},
                texts={ARCHITECTURE_FILE: architecture},
                beside=files[0] if files else None,
                registry=self._config.wandb_registry,
            )
        )

    def close(self, limit: float | None = None) -> UploadResult:
        """
        Wait for the uploads, then say what was delivered. Call it before `run.finish()`.

        It waits for at most `limit` seconds; None: while the server answers and bytes move. It never raises: Ctrl-C
        ends the waiting. What W&B has not confirmed stays staged, for the next attempt or the command returned.
        """
        if self._result is None:
            self._result = self._uploads.close(limit)
        return self._result

    def _take_up(self) -> None:
        """Queue what an earlier attempt has left staged, before anything new."""
        root = self._output_dir / STAGING_FOLDER
        sweep(root)
        left = [staged for staged in waiting(root) if staged.run_id == self._run.id]
        if self._run.offline:  # the rest is recorded in the file of an earlier attempt
            left = [staged for staged in left if staged.sync_dir is None]
        if left:
            logger.info("%d artifacts of an earlier attempt go to W&B first.", len(left))
            self._uploads.add(left, may_be_late=True)

    def _stage(self, version: _Version) -> None:
        run, now = self._run, time.time()
        is_ordered = version.saved_at is None
        root = (self._output_dir if version.beside is None else version.beside.absolute().parent) / STAGING_FOLDER
        own = {"run_id": run.id, **({"saved_at": now} if is_ordered else {})}
        try:
            staged = stage(
                root,
                links=version.links,
                texts=version.texts,
                name=version.collection,
                aliases=version.aliases,
                metadata=_numbers_as_json({**version.metadata, **own}),
                description=f"{version.what}, run {run.id}",
                entity=run.entity or "",
                project=run.project or "",
                run_id=run.id,
                saved_at=now if version.saved_at is None else version.saved_at,
                registry=version.registry,
            )
        except OSError as error:
            if not self._has_failed:
                logger.warning("An artifact for W&B could not be staged, training goes on: %s", one_line(error))
            self._has_failed = True
            reason = f"could not be staged: {one_line(error)}"
            self._uploads.add_failed(Pending(name=version.collection, aliases=version.aliases, reason=reason))
            return
        if staged.is_copied() and not self._has_copied:
            self._has_copied = True
            logger.warning("%s takes no hard links: artifacts for W&B are copied there.", root)
        self._uploads.add([staged], may_be_late=not is_ordered)


def open_artifacts(
    run: Any, config: TrackingConfig, output_dir: Path | None, *, suffix: str | None = None
) -> Artifacts | None:
    """
    Return the artifacts of an open run as the --wandb_ flags say; None if models are not logged.

    `suffix`: what they are called by; without it the run's name if one was asked for, else its id.
    """
    if run is None or run.disabled or config.wandb_log_model == "false":
        return None
    if suffix is None:
        # A run that is called like its folder has a path for a name: the Trainer takes its id then.
        named = config.run_name not in (None, str(output_dir))
        suffix = (run.name if named else None) or run.id
    return Artifacts(run, config, suffix=suffix, output_dir=output_dir)


def _allowed(suffix: str, run_id: str) -> str:
    """The suffix in the characters that W&B allows in a name; the run's id if nothing is left."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", suffix)[:LONGEST_SUFFIX].strip("-")
    name = name if re.search(r"[A-Za-z0-9]", name) else run_id
    if name != suffix:
        logger.warning("The artifacts are called ...-%s: W&B allows letters, digits, -_. in their names.", name)
    return name


def _numbers_as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values masked, in JSON types; NaN and the infinities, for which JSON has no numbers, as W&B's texts."""
    found: dict[str, Any] = json.loads(json.dumps(masked(plain(values))), parse_constant=str)
    return found
