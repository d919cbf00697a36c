"""The manifest of a checkpoint, written last: sizes and digests of the other files, and our own state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATE_FILE = "harness_state.json"
OWN_DIGEST = "sha256"  # of the manifest, which no other file has
FORMAT_VERSION = 1


def manifest_of(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's manifest; {} if there is none or it is no such file."""
    try:
        content = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def digest_of_manifest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest without the digest that it has of itself; the order of names is none of it."""
    rest = json.loads(json.dumps({name: value for name, value in content.items() if name != OWN_DIGEST}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
