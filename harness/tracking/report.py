"""What the server has of a run when it is over: asked, not assumed, since wandb's client stays quiet about losses."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import requests

from harness.tracking.artifacts import Delivery

logger = logging.getLogger(__name__)

ASK_TIMEOUT_SECONDS = 10
# The question the client asks before it resumes a run.
QUESTION = """
query RunRows($entity: String, $project: String, $run: String!) {
  model(name: $project, entityName: $entity) { bucket(name: $run, missingOk: true) { historyLineCount } }
}
"""


@dataclass(frozen=True, kw_only=True)
class RowCount:
    """Rows of the history: sent by the client, and on the server; None where that can't be known."""

    sent: int | None
    confirmed: int | None

    @property
    def is_whole(self) -> bool:
        """Whether the server has every row."""
        return self.sent is not None and self.confirmed is not None and self.confirmed >= self.sent


def count_rows(run: Any, *, sent: int | None) -> RowCount:
    """Ask the server how many rows an online run has; a few seconds at most."""
    if run.offline or run.disabled or sent is None:
        return RowCount(sent=sent, confirmed=None)
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


def describe_delivery(run: Any, rows: RowCount | None, delivery: Delivery | None) -> list[str]:
    """What has arrived and what has not, with the command that delivers it: a line for rows, one for artifacts."""
    lines = []
    folder = run.settings.sync_dir
    if rows is not None and not run.disabled and not run.offline:
        if rows.is_whole:
            lines.append(f"{rows.confirmed} rows, all confirmed by the server")
        else:
            known = "an unknown number" if rows.confirmed is None else str(rows.confirmed)
            lines.append(f"{known} of {rows.sent} rows confirmed by the server; deliver the rest: wandb sync {folder}")
    if delivery is not None:
        lines.append(delivery.describe())
    return lines


def _api_key(settings: Any) -> str:
    if settings.api_key:
        return str(settings.api_key)
    from wandb.sdk.lib.wbauth import HostUrl, authenticate_session

    host = HostUrl(settings.base_url, app_url=settings.app_url)
    found = authenticate_session(host=host, source="harness", prompt=False, update_session=False)
    return str(getattr(found, "api_key", ""))
