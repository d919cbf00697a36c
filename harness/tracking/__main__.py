"""
After the training: deliver the artifacts and rows that runs could not, link an artifact to a registry.

`python -m harness.tracking upload OUTPUT_DIR`, `python -m harness.tracking link ENTITY/PROJECT/NAME:ALIAS --registry
NAME`. Exit codes: 0 done, 1 something is left, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness.errors import ConfigError, DeliveryError, RowsError, TrackingError, UnreachableError
from harness.tracking.artifacts.staging import STAGING_FOLDER, Staged, waiting
from harness.tracking.artifacts.upload import deliver_staged, registry_path
from harness.tracking.client import one_line, open_api, server_answers
from harness.tracking.rows.server import connection, deliver_rows, online_logs
from harness.tracking.rows.wandb_file import TransactionLog

SOURCE = "python -m harness.tracking"
FULL_NAME = re.compile(r"[^/:]+/[^/:]+/[^/:]+:[^/:]+")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    try:
        given = _parser().parse_args(argv)
        if given.command == "link":
            return link(given.artifact, given.registry, given.alias)
        return upload(given.output_dir)
    except ConfigError as error:
        return _fail(2, str(error))
    except (TrackingError, UnreachableError) as error:
        return _fail(1, str(error))
    except KeyboardInterrupt:
        return _fail(130, "Interrupted; what was not delivered stays staged.")


def upload(output_dirs: Sequence[Path]) -> int:
    """Deliver what runs left in the folders: rows of online runs, then staged artifacts, in order."""
    logs: list[TransactionLog] = []
    found: list[Staged] = []
    left = 0
    for folder in output_dirs:
        (here, problems), staged = online_logs(folder), waiting(folder / STAGING_FOLDER)
        left += sum(_fail(1, problem) for problem in problems)
        if not (here or staged or problems):
            raise ConfigError(
                f"{folder} holds no online run and no staged artifacts ({folder / STAGING_FOLDER}); offline runs: "
                f"`python -m harness.sync {folder}`."
            )
        logs += here
        found += staged
    api = open_api(SOURCE, silent=True)
    jobs = [(f"{log.project}/{log.run_id}", partial(_upload_rows, api, log)) for log in logs]
    jobs += [(f"{staged.name} ({staged.aliases[-1]})", partial(deliver_staged, api, staged)) for staged in found]
    for name, job in jobs:
        try:
            print(job(), flush=True)
        except Exception as error:  # wandb and its transports raise many types; the next one is tried all the same
            left += 1
            reason = str(error) if isinstance(error, DeliveryError | RowsError) else one_line(error)
            _fail(1, f"{name} is not delivered: {reason}")
            _check_server(api)
    return 1 if left else 0


def _upload_rows(api: Any, log: TransactionLog) -> str:
    """Deliver the rows of a run; returns what to say. Raises RowsError, and what wandb and requests raise."""
    ask, post = connection(api, log)
    sent = deliver_rows(log, ask=ask, post=post)
    name = f"{log.entity or api.default_entity}/{log.project}/{log.run_id}"
    return f"{name}: {sent} rows delivered" if sent else f"{name}: W&B has all rows of {log.folder.name}"


def link(name: str, registry: str, aliases: Sequence[str]) -> int:
    """Link an artifact that W&B has to a collection of a registry."""
    if not FULL_NAME.fullmatch(name):
        raise ConfigError(f"{name}: give an artifact as ENTITY/PROJECT/NAME:ALIAS or ENTITY/PROJECT/NAME:v3.")
    api = open_api(SOURCE, silent=True)
    try:
        linked = api.artifact(name).link(registry_path(registry), list(aliases))
    except Exception as error:  # as above
        raise TrackingError(f"{name} can't be linked to {registry_path(registry)}: {one_line(error)}") from error
    print(f"{name} is linked as {linked.qualified_name}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.tracking", description="W&B after the training.")
    commands = parser.add_subparsers(dest="command", required=True)
    of_upload = commands.add_parser("upload", help="Deliver what runs could not.", allow_abbrev=False)
    of_upload.add_argument("output_dir", nargs="+", type=Path, help="Folders of trainings, or of W&B's run-*.")
    of_link = commands.add_parser("link", help="Link an artifact to a registry.", allow_abbrev=False)
    of_link.add_argument("artifact", metavar="ENTITY/PROJECT/NAME:ALIAS")
    of_link.add_argument("--registry", required=True, help="Collection in W&B's model registry, or a full path to one.")
    of_link.add_argument("--alias", action="append", default=[], help="Alias of the linked version; may be repeated.")
    return parser


def _check_server(api: Any) -> None:
    base_url = api.settings["base_url"]
    if not server_answers(base_url):
        raise TrackingError(f"W&B can't be reached at {base_url} any more; what is left stays staged.")


def _fail(code: int, message: str) -> int:
    print(f"harness.tracking: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
