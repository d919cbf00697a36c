"""
After the training: deliver the artifacts and rows that runs could not, link an artifact to a registry.

`python -m harness.tracking upload OUTPUT_DIR`, `python -m harness.tracking link ENTITY/PROJECT/NAME:ALIAS --registry
NAME`. Exit codes: 0 done, 1 something is left, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import requests

from harness.config import ConfigError
from harness.tracking.api import API_TIMEOUT_SECONDS, UnreachableError, open_api
from harness.tracking.delivery import deliver, link_command, registry_path, save_without_run
from harness.tracking.opening import one_line, server_answers
from harness.tracking.rows import QUESTION, RowsError, deliver_rows, online_logs, parse_answer
from harness.tracking.staging import FOLDER, Staged, discard, waiting
from harness.tracking.transaction_log import TransactionLog

SOURCE = "python -m harness.tracking"
FULL_NAME = re.compile(r"[^/:]+/[^/:]+/[^/:]+:[^/:]+")


class CommandError(Exception):
    """What keeps the command from its work, for the user to put right."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    try:
        given = _parser().parse_args(argv)
        if given.command == "link":
            return link(given.artifact, given.registry, given.alias)
        return upload(given.output_dir)
    except ConfigError as error:
        return _fail(2, str(error))
    except (CommandError, UnreachableError) as error:
        return _fail(1, str(error))
    except KeyboardInterrupt:
        return _fail(130, "Interrupted; what was not delivered stays staged.")


def upload(output_dirs: Sequence[Path]) -> int:
    """Deliver what runs left in the folders: rows of online runs, then staged artifacts, in order."""
    logs: list[TransactionLog] = []
    found: list[Staged] = []
    left = 0
    for folder in output_dirs:
        (here, problems), staged = online_logs(folder), waiting(folder / FOLDER)
        left += sum(_fail(1, problem) for problem in problems)
        if not (here or staged or problems):
            raise ConfigError(
                f"{folder} holds no online run and no staged artifacts ({folder / FOLDER}); offline runs: `wandb sync`."
            )
        logs += here
        found += staged
    api = open_api(SOURCE, silent=True)
    jobs = [(f"{log.project}/{log.run_id}", partial(_upload_rows, api, log)) for log in logs]
    jobs += [(f"{staged.name} ({staged.aliases[-1]})", partial(_upload, api, staged)) for staged in found]
    for name, job in jobs:
        try:
            print(job(), flush=True)
        except Exception as error:  # wandb and its transports raise many types; the next one is tried all the same
            left += 1
            reason = str(error) if isinstance(error, CommandError | RowsError) else one_line(error)
            _fail(1, f"{name} is not delivered: {reason}")
            _check_server(api)
    return 1 if left else 0


def _upload_rows(api: Any, log: TransactionLog) -> str:
    """Deliver the rows of a run; returns what to say. Raises RowsError, and what wandb and requests raise."""
    entity = log.entity or api.default_entity
    base_url = api.settings["base_url"].rstrip("/")
    variables = {"entity": entity, "project": log.project, "run": log.run_id}

    def post(body: dict[str, Any]) -> None:
        address = f"{base_url}/files/{entity}/{log.project}/{log.run_id}/file_stream"
        requests.post(address, json=body, auth=("api", api.api_key), timeout=API_TIMEOUT_SECONDS).raise_for_status()

    sent = deliver_rows(log, ask=lambda: parse_answer(api._service_api.execute_graphql(QUESTION, variables)), post=post)
    name = f"{entity}/{log.project}/{log.run_id}"
    return f"{name}: {sent} rows delivered" if sent else f"{name}: W&B has all rows of {log.folder.name}"


def _upload(api: Any, staged: Staged) -> str:
    """Deliver one artifact; returns what to say. Raises CommandError, and what `deliver` raises."""
    from wandb.errors import CommError

    staged = dataclasses.replace(staged, entity=staged.entity or api.default_entity)
    run = f"{staged.entity}/{staged.project}/{staged.run_id}"
    try:
        api.run(run)
    except CommError as error:
        if not server_answers(api.settings["base_url"]):
            raise
        sync = staged.sync_dir or "and the folder of the run"
        raise CommandError(f"W&B has no run {run}; bring it there first: wandb sync {sync}") from error
    log = partial(save_without_run, api, staged)
    committed = deliver(staged, api=lambda: api, log=log, may_be_late=True)
    discard(staged)
    name = f"{staged.entity}/{staged.project}/{committed.name}"
    if staged.registry is None:
        return f"{name} delivered ({', '.join(staged.aliases)})"
    try:
        committed.link(registry_path(staged.registry), staged.aliases)
    except Exception as error:  # as above
        command = link_command(name, staged.registry, staged.aliases)
        raise CommandError(f"{name} is, but not linked: {one_line(error)}; link it: {command}") from error
    return f"{name} delivered and linked to {registry_path(staged.registry)}"


def link(name: str, registry: str, aliases: Sequence[str]) -> int:
    """Link an artifact that W&B has to a collection of a registry."""
    if not FULL_NAME.fullmatch(name):
        raise ConfigError(f"{name}: give an artifact as ENTITY/PROJECT/NAME:ALIAS or ENTITY/PROJECT/NAME:v3.")
    api = open_api(SOURCE, silent=True)
    try:
        linked = api.artifact(name).link(registry_path(registry), list(aliases))
    except Exception as error:  # as above
        raise CommandError(f"{name} can't be linked to {registry_path(registry)}: {one_line(error)}") from error
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
        raise CommandError(f"W&B can't be reached at {base_url} any more; what is left stays staged.")


def _fail(code: int, message: str) -> int:
    print(f"harness.tracking: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
