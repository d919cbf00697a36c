"""What has arrived of a run when it is over: asked, not assumed, since wandb's client stays quiet about losses."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from harness.tracking.artifacts.log import Delivery
from harness.tracking.rows.wandb_file import read_log

logger = logging.getLogger(__name__)

ASK_TIMEOUT_SECONDS = 10
# `wandb sync` passes online runs over.
UPLOAD = "python -m harness.tracking upload"
# The question the client asks before it resumes a run.
QUESTION = """
query RunRows($entity: String, $project: String, $run: String!) {
  model(name: $project, entityName: $entity) { bucket(name: $run, missingOk: true) { historyLineCount } }
}
"""


@dataclass(frozen=True, kw_only=True)
class RowCount:
    """Rows of the history: sent by the client, and on the server or in an offline run's file; None where unknown."""

    sent: int | None
    confirmed: int | None

    @property
    def is_whole(self) -> bool:
        """Whether every row has arrived."""
        return self.sent is not None and self.confirmed is not None and self.confirmed >= self.sent


def count_rows(run: Any, *, sent: int | None) -> RowCount:
    """Ask the server how many rows an online run has, a few seconds at most; read the file of an offline one."""
    if run.disabled or sent is None:
        return RowCount(sent=sent, confirmed=None)
    if run.offline:
        return RowCount(sent=sent, confirmed=_rows_in_file(Path(run.settings.sync_file)))
    settings = run.settings
    variables = {"entity": settings.entity, "project": settings.project, "run": settings.run_id}
    try:
        answer = requests.post(
            f"{settings.base_url}/graphql",
            json={"query": QUESTION, "variables": variables},
            auth=("api", _api_key(settings)),
            timeout=ASK_TIMEOUT_SECONDS,
        )
        answer.raise_for_status()
        confirmed = int(answer.json()["data"]["model"]["bucket"]["historyLineCount"])
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        logger.debug("The rows on the server could not be counted: %s", error)
        return RowCount(sent=sent, confirmed=None)
    return RowCount(sent=sent, confirmed=confirmed)


def describe_delivery(
    run: Any, rows: RowCount | None, delivery: Delivery | None, *, home: Path | None = None
) -> list[str]:
    """
    What has arrived and what has not, with the command that delivers it: a line for rows, one for artifacts.

    home: the folder that holds the journal of the rows; default: the run's own has what there is.
    """
    lines = []
    folder = Path(run.settings.sync_dir)
    if rows is not None and not run.disabled and not (run.offline and rows.is_whole):
        known = "an unknown number" if rows.confirmed is None else str(rows.confirmed)
        if rows.is_whole:
            lines.append(f"{known} rows, all confirmed by the server")
        elif run.offline:  # nothing has been said of it: wandb goes on as if the disk took all
            lines.append(f"{known} of {rows.sent} rows are in {folder}, the others are lost (a full disk?)")
        elif delivery is not None and delivery.command and str(folder.parents[1]) in shlex.split(delivery.command):
            lines.append(f"{known} of {rows.sent} rows confirmed by the server; deliver the rest as the artifacts")
        else:
            command = f"{UPLOAD} {shlex.quote(str(home or folder))}"
            lines.append(f"{known} of {rows.sent} rows confirmed by the server; deliver the rest: {command}")
    if delivery is not None:
        lines.append(delivery.describe())
    return lines


def _rows_in_file(path: Path) -> int | None:
    try:
        log = read_log(path)
    except (OSError, ValueError) as error:
        logger.debug("The rows in %s could not be counted: %s", path, error)
        return None
    # Numbered from 0, which skips what a step given by the user skips.
    return 0 if log is None or not log.rows else int(log.rows[-1].get("_step", len(log.rows) - 1)) + 1


def _api_key(settings: Any) -> str:
    if settings.api_key:
        return str(settings.api_key)
    from wandb.sdk.lib.wbauth import HostUrl, authenticate_session

    host = HostUrl(settings.base_url, app_url=settings.app_url)
    found = authenticate_session(host=host, source="harness", prompt=False, update_session=False)
    return str(getattr(found, "api_key", ""))
