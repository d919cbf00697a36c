"""Downloads artifacts as told: a line of JSON in for each, a line of what became of it out."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.tracking import client
from harness.tracking.artifacts import download as downloads
from harness.tracking.flags import TrackingConfig

FLAG = "resume_from_checkpoint"


def log(names: list[str], folder: Path) -> None:
    """Log the folder under each of the names."""
    import wandb

    run = wandb.init(project="huggingface")
    for name in names:
        artifact = wandb.Artifact(name, "model")
        artifact.add_dir(str(folder))
        run.log_artifact(artifact).wait()
    run.finish()


def answer(case: dict[str, Any]) -> dict[str, Any]:
    if "log" in case:
        log(case["log"], Path(case["folder"]))
        return {}
    try:
        artifact = downloads.find_artifact(FLAG, f"wandb:{case['name']}", TrackingConfig())
        if "folder" in case:
            downloads.bring(FLAG, artifact, Path(case["folder"]), list(artifact.manifest.entries))
    except ConfigError as error:
        return {"error": str(error)}
    return {"names": list(artifact.manifest.entries)}


def main() -> None:
    client.API_TIMEOUT_SECONDS, client.MANIFEST_TIMEOUT_SECONDS = 5, 3
    downloads.PATIENCE_SECONDS, downloads.ATTEMPTS = 3.0, 2
    for line in sys.stdin:
        began = time.monotonic()
        found = answer(json.loads(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**found, "seconds": time.monotonic() - began, "peak_mib": peak}), flush=True)


if __name__ == "__main__":
    main()
