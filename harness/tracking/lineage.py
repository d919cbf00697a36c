"""
What a search that exchanges checkpoints has noted in the folder of a run: whose checkpoints its weights come from.

The search writes the file before each of its starts; here it becomes a part of the run's configuration and, where
checkpoints are artifacts, of W&B's graph of artifacts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.files import write_whole
from harness.tracking.client import one_line
from harness.tracking.damage import is_count, read_json
from harness.tracking.flags import TrackingConfig
from harness.tracking.run.identity import Identity, parse

logger = logging.getLogger(__name__)

LINEAGE_FILE = "lineage.json"


def write(output_dir: Path, facts: Mapping[str, Any], *, source: Mapping[str, Any] | None, step: int) -> None:
    """
    Note what a run is in a search, and from which run's checkpoint of a `step` it goes on, None: its own.

    `source` is what that checkpoint says of its run. Raises OSError.
    """
    content = {"facts": facts, "source": source, "step": step}
    write_whole(output_dir / LINEAGE_FILE, json.dumps(content, indent=2) + "\n", durable=True)


def facts_of(output_dir: Path) -> dict[str, Any]:
    """Return what goes into the configuration of the run in a folder; {} if no search has noted anything."""
    facts = _read(output_dir).get("facts")
    return facts if isinstance(facts, dict) else {}


def artifacts_of(output_dir: Path, config: TrackingConfig) -> list[str]:
    """Return the artifact that the run goes on from, ENTITY/PROJECT/NAME:ALIAS, if it is another run's, and logged."""
    noted = _read(output_dir)
    source, step = parse(noted.get("source") or {}, source=LINEAGE_FILE), noted.get("step")
    if source is None or not is_count(step) or config.wandb_log_model != "checkpoint" or not config.sends:
        return []
    return [f"{source.entity}/{source.project}/{_collection(source, config)}:checkpoint_global_step_{step}"]


def _collection(source: Identity, config: TrackingConfig) -> str:
    kind = "checkpoint" if config.wandb_artifact_names == "harness" else "model"
    return f"{kind}-{source.artifacts or source.run_id}"


def _read(output_dir: Path) -> dict[str, Any]:
    try:
        noted = read_json(output_dir / LINEAGE_FILE)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s can't be read, W&B does not learn it: %s", output_dir / LINEAGE_FILE, one_line(error))
        return {}
    return noted if isinstance(noted, dict) else {}
