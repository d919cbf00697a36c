"""`harness link ENTITY/PROJECT/NAME:ALIAS --registry NAME`: link an artifact in W&B to a registry."""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.commands import Parser
from harness.errors import ConfigError, TrackingError

FULL_NAME = re.compile(r"[^/:]+/[^/:]+/[^/:]+:[^/:]+")


def parser() -> Parser:
    """Return the command's parser."""
    own = Parser("link", description="Link an artifact that W&B has to a collection of a registry.")
    own.add_argument("artifact", metavar="ENTITY/PROJECT/NAME:ALIAS")
    own.add_argument("--registry", required=True, help="Collection in W&B's model registry, or a full path to one.")
    own.add_argument("--alias", action="append", default=[], help="Alias of the linked version; may be repeated.")
    return own


def run(argv: Sequence[str]) -> int:
    """Link the artifact; returns the exit code. Raises ConfigError, UnreachableError and TrackingError."""
    given = parser().parse_args(argv)
    if not FULL_NAME.fullmatch(given.artifact):
        raise ConfigError(f"{given.artifact}: give an artifact as ENTITY/PROJECT/NAME:ALIAS or ENTITY/PROJECT/NAME:v3.")
    from harness.tracking.artifacts.upload import registry_path
    from harness.tracking.client import one_line, open_api

    path = registry_path(given.registry)
    api = open_api("harness link", silent=True)
    try:
        linked = api.artifact(given.artifact).link(path, given.alias)
    except Exception as error:  # wandb and its transports raise many types
        raise TrackingError(f"{given.artifact} can't be linked to {path}: {one_line(error)}") from error
    print(f"{given.artifact} is linked as {linked.qualified_name}", flush=True)
    return 0
