"""
Take over a checkpoint of one run as the checkpoint of another, to the bit: what population based search does.

Weights, optimizer, random states and position in the data are the other run's; which W&B run it is and which rows it
has stay this run's own. Large files are hard links. Reads no torch.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.checkpoint.manifest import OWN_DIGEST, STATE_FILE, digest_of_manifest, manifest_of
from harness.errors import CheckpointError
from harness.files import put_in_place, sync, write_json

OF_THE_RUN = "metrics.jsonl"  # the rows up to the checkpoint


def pin(checkpoint: Path, place: Path) -> None:
    """
    Keep a checkpoint at another place of its disk, whole or not at all, whatever its run deletes; as hard links.

    Nothing is done if it is there. Raises OSError.
    """
    if place.is_dir():
        return
    partial = place.with_name(f"{place.name}.{secrets.token_hex(4)}.partial")
    try:
        _link_all(checkpoint, partial)
        partial.rename(place)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not place.is_dir():  # else another process was faster
            raise
    sync(place.parent)


def adopt(source: Path, own: Path, output_dir: Path, *, arguments: Mapping[str, Any], note: Mapping[str, Any]) -> Path:
    """
    Put the checkpoint `source` of another run into a run's `output_dir`, in place of its `own` one of the same step.

    Both are outside of the folder, which no process may be writing to. `arguments` are recorded as those that it goes
    on with, and the `note` says where it is from. Returns the new checkpoint. A kill leaves it whole or not there, and
    the call can be repeated. Raises CheckpointError for checkpoints of two steps, OSError if the disk fails.
    """
    theirs, ours = manifest_of(source), manifest_of(own)
    step = ours.get("step")
    if step is None or theirs.get("step") != step:
        steps = f"{theirs.get('step')} and {step}"
        raise CheckpointError(f"{source} and {own} are of the steps {steps}, which must be equal.")
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f"checkpoint-{step}.{secrets.token_hex(4)}.partial"
    _link_all(source, partial, without=(STATE_FILE, OF_THE_RUN))
    files = {name: facts for name, facts in theirs["files"].items() if name != OF_THE_RUN}
    if OF_THE_RUN in ours["files"]:
        shutil.copyfile(own / OF_THE_RUN, partial / OF_THE_RUN)
        sync(partial / OF_THE_RUN)
        files[OF_THE_RUN] = ours["files"][OF_THE_RUN]
    manifest = {
        **{name: value for name, value in theirs.items() if name != OWN_DIGEST},
        "files": files,
        "arguments": {**theirs["arguments"], **arguments},
        "tracking": ours.get("tracking", {}),
        "adopted": dict(note),
    }
    write_json(partial / STATE_FILE, {**manifest, OWN_DIGEST: digest_of_manifest(manifest)})
    sync(partial / STATE_FILE)
    sync(partial)
    put_in_place(partial, final)
    return final


def _link_all(folder: Path, target: Path, *, without: tuple[str, ...] = ()) -> None:
    """Make `target` with the files of a folder, as hard links where the disk has them, else as copies."""
    target.mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir():
            (target / name).mkdir()
        elif name.as_posix() not in without:
            try:
                os.link(path, target / name)
            except OSError:
                shutil.copyfile(path, target / name)
                sync(target / name)
    sync(target)
