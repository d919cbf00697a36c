"""WANDB_LOG_MODEL: checkpoints and models go to W&B in the background; the training only makes hard links."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config import plain
from harness.tracking.artifacts.outcome import Delivery, Pending
from harness.tracking.artifacts.queue import Uploads
from harness.tracking.artifacts.staging import FOLDER, stage, sweep, waiting
from harness.tracking.flags import TrackingConfig
from harness.tracking.run.open import one_line

__all__ = ["Artifacts", "Delivery", "Pending"]

logger = logging.getLogger(__name__)

ARCHITECTURE_FILE = "model_architecture.txt"
LONGEST_SUFFIX = 128 - len("checkpoint-")  # W&B's limit for a name


class Artifacts:
    """
    The artifacts of one W&B run. Rank zero's; every method but `close` returns within milliseconds and never raises.

    - run: the open wandb run. log_model: "end" or "checkpoint". suffix: the run's name, or its id.
    - naming: "harness" gives checkpoints a collection of their own, "transformers" puts all into `model-SUFFIX`.
    - keep_checkpoints: how many versions of its checkpoints the run leaves in W&B; None: all.
    - registry: the registered model that the final model is linked to.
    - finish_timeout: seconds without any answer of the server after which `close` gives up.
    - output_dir: where an earlier life of the run may have left something; default: where wandb keeps its files.

    What is to be uploaded is hard-linked into the folder `wandb-artifacts` beside it, and stays there until W&B has
    confirmed it. `Uploads` says in what order it goes.
    """

    def __init__(
        self,
        run: Any,
        *,
        log_model: str,
        suffix: str,
        naming: str = "harness",
        keep_checkpoints: int | None = None,
        registry: str | None = None,
        finish_timeout: float = 120.0,
        output_dir: Path | None = None,
    ) -> None:
        self._run, self._log_model, self._registry = run, log_model, registry
        self._output_dir = Path(run.settings.root_dir if output_dir is None else output_dir).absolute()
        name = _allowed(suffix, run.id)
        self._model = f"model-{name}"
        self._checkpoints = f"checkpoint-{name}" if naming == "harness" else self._model
        self._uploads = Uploads(run, keep_checkpoints=keep_checkpoints, finish_timeout=finish_timeout)
        self._has_failed = self._has_copied = False
        self._delivery: Delivery | None = None
        self._take_up()

    def log_architecture(self, text: str, *, metadata: Mapping[str, Any]) -> None:
        """Log the description of the model, the first version of its collection. Newer ones keep `latest`."""
        texts = {ARCHITECTURE_FILE: text}
        self._stage(self._model, ["base_model"], metadata, "Architecture of the model", texts=texts, saved_at=0.0)

    def log_checkpoint(
        self, folder: Path, *, step: int, epoch: float, is_best: bool, metadata: Mapping[str, Any]
    ) -> None:
        """Log all files of a whole checkpoint, if checkpoints are wanted. `folder` may be deleted afterwards."""
        if self._log_model != "checkpoint":
            return
        links = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        aliases = [f"epoch_{round(epoch, 2)}", f"checkpoint_global_step_{step}", *(["best"] if is_best else [])]
        what = f"Checkpoint of step {step}"
        self._stage(self._checkpoints, aliases, metadata, what, links=links, beside=folder)

    def log_model(self, files: Sequence[Path], *, architecture: str, metadata: Mapping[str, Any]) -> None:
        """Log the final model. Its files may be deleted or replaced afterwards, but not rewritten in place."""
        links, texts = {path.name: path for path in files}, {ARCHITECTURE_FILE: architecture}
        self._stage(
            self._model,
            ["final_model"],
            metadata,
            "Final model",
            links=links,
            texts=texts,
            beside=files[0] if files else None,
            registry=self._registry,
        )

    def close(self, limit: float | None = None) -> Delivery:
        """
        Wait for the uploads, then say what was delivered. Call it before `run.finish()`.

        It waits for at most `limit` seconds; None: while the server answers and bytes move. It never raises: Ctrl-C
        ends the waiting. What W&B has not confirmed stays staged, for the next life of the run or the command returned.
        """
        if self._delivery is None:
            self._delivery = self._uploads.close(limit)
        return self._delivery

    def _take_up(self) -> None:
        """Queue what an earlier life of this run left behind, before anything new."""
        root = self._output_dir / FOLDER
        sweep(root)
        left = [staged for staged in waiting(root) if staged.run_id == self._run.id]
        if self._run.offline:  # the rest is recorded in the file of an earlier life
            left = [staged for staged in left if staged.sync_dir is None]
        if left:
            logger.info("%d artifacts of an earlier life of this run go to W&B first.", len(left))
            self._uploads.add(left, may_be_late=True)

    def _stage(
        self,
        name: str,
        aliases: list[str],
        metadata: Mapping[str, Any],
        what: str,
        *,
        links: Mapping[str, Path] | None = None,
        texts: Mapping[str, str] | None = None,
        beside: Path | None = None,
        saved_at: float | None = None,
        registry: str | None = None,
    ) -> None:
        run, now = self._run, time.time()
        root = (self._output_dir if beside is None else beside.absolute().parent) / FOLDER
        own = {"run_id": run.id, **({"saved_at": now} if saved_at is None else {})}
        try:
            staged = stage(
                root,
                links=links or {},
                texts=texts or {},
                name=name,
                aliases=aliases,
                metadata=_numbers_as_json({**metadata, **own}),
                description=f"{what}, run {run.id}",
                entity=run.entity or "",
                project=run.project or "",
                run_id=run.id,
                saved_at=now if saved_at is None else saved_at,
                registry=registry,
            )
        except OSError as error:
            if not self._has_failed:
                logger.warning("An artifact for W&B could not be staged, training goes on: %s", one_line(error))
            self._has_failed = True
            reason = f"could not be staged: {one_line(error)}"
            self._uploads.add_failed(Pending(name=name, aliases=aliases, reason=reason))
            return
        if staged.is_copied() and not self._has_copied:
            self._has_copied = True
            logger.warning("%s takes no hard links: artifacts for W&B are copied there.", root)
        self._uploads.add([staged], may_be_late=saved_at is not None)


def open_artifacts(run: Any, config: TrackingConfig, output_dir: Path | None) -> Artifacts | None:
    """The artifacts of an open run, as --wandb_log_model and its companions say; None without any."""
    if run is None or run.disabled or config.wandb_log_model == "false":
        return None
    # A run that is called like its folder has a path for a name: the Trainer takes its id then.
    named = config.run_name not in (None, str(output_dir))
    return Artifacts(
        run,
        log_model=config.wandb_log_model,
        suffix=(run.name if named else None) or run.id,
        naming=config.wandb_artifact_names,
        keep_checkpoints=config.wandb_keep_checkpoints,
        registry=config.wandb_registry,
        finish_timeout=config.wandb_finish_timeout,
        output_dir=output_dir,
    )


def _allowed(suffix: str, run_id: str) -> str:
    """The suffix in the characters that W&B allows in a name; the run's id if nothing is left."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", suffix)[:LONGEST_SUFFIX].strip("-")
    name = name if re.search(r"[A-Za-z0-9]", name) else run_id
    if name != suffix:
        logger.warning("The artifacts are called ...-%s: W&B allows letters, digits, -_. in their names.", name)
    return name


def _numbers_as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in JSON types; NaN and the infinities, which JSON has no numbers for, as W&B's texts for them."""
    found: dict[str, Any] = json.loads(json.dumps(plain(values)), parse_constant=str)
    return found
