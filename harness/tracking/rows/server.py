"""
Rows of an online run that never reached the server: sent from the run's folder, each exactly once.

`wandb sync` passes online runs over, and with --include-online it sends all rows again behind those that are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from harness.errors import RowsError
from harness.tracking.client import API_TIMEOUT_SECONDS
from harness.tracking.rows.journal import FILE as JOURNAL
from harness.tracking.rows.journal import Journal
from harness.tracking.rows.wandb_file import TransactionLog, read_log
from harness.tracking.run import identity as identities

HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
# Where the .wandb files of online runs are: in a run's folder, below wandb's, below an output_dir.
PATTERNS = ("run-*.wandb", "run-*/run-*.wandb", "wandb/run-*/run-*.wandb")
ENDED = ("finished", "failed", "killed", "preempted")
BATCH_ROWS, BATCH_CHARACTERS = 500, 2_000_000
CONFIRM_SECONDS = 15.0
QUESTION = """
query RunRows($entity: String, $project: String, $run: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $run, missingOk: true) { historyLineCount historyTail summaryMetrics state }
  }
}"""


@dataclass(frozen=True, kw_only=True)
class AtServer:
    """What W&B has of a run: the number of its rows, the last of them, its summary, its state."""

    count: int
    last: dict[str, Any]
    summary: dict[str, Any]
    state: str


def online_logs(folder: Path) -> tuple[list[TransactionLog], list[str]]:
    """The last life of each online run in a folder, oldest first; and what is wrong with files that can't be read."""
    latest: dict[str, TransactionLog] = {}
    problems = []
    paths = {path for pattern in PATTERNS for path in folder.absolute().glob(pattern)}
    for path in sorted(path for path in paths if path.parent.name.startswith("run-")):
        try:
            log = read_log(path)
        except (OSError, ValueError) as error:
            problems.append(f"{path} can't be read: {error}")
            continue
        # A life begins with the row that the server awaits: rows of the lives before are there, or were made again.
        if log is not None and (log.run_id not in latest or log.started_at > latest[log.run_id].started_at):
            latest[log.run_id] = log
    if (journaled := _journaled(folder, latest)) is not None:
        latest[journaled.run_id] = journaled
    return sorted(latest.values(), key=lambda log: log.started_at), problems


def connection(api: Any, log: TransactionLog) -> tuple[Callable[[], AtServer | None], Callable[[dict[str, Any]], None]]:
    """What asks the server of a run, and what sends one request of its file stream. They raise what wandb does."""
    entity = log.entity or api.default_entity
    base_url = api.settings["base_url"].rstrip("/")
    variables = {"entity": entity, "project": log.project, "run": log.run_id}
    address = f"{base_url}/files/{entity}/{log.project}/{log.run_id}/file_stream"

    def ask() -> AtServer | None:
        return parse_answer(api._service_api.execute_graphql(QUESTION, variables))

    def post(body: dict[str, Any]) -> None:
        requests.post(address, json=body, auth=("api", api.api_key), timeout=API_TIMEOUT_SECONDS).raise_for_status()

    return ask, post


def deliver_rows(
    log: TransactionLog, *, ask: Callable[[], AtServer | None], post: Callable[[dict[str, Any]], None]
) -> int:
    """
    Send the rows that the server lacks, then the summary and how the run ended; returns how many rows it was.

    `post` sends one request of W&B's file stream. There rows have numbers, so a second attempt after a kill writes
    the same rows to the same places. Raises RowsError before anything is sent if the two don't fit together.
    """
    server = ask()
    if server is None:
        raise RowsError("W&B does not have the run")
    rows = missing(log.rows, server)
    # Where other rows follow ours, the run went on elsewhere and may be running there.
    is_last = not log.rows or bool(rows) or _is_same(server.last, log.rows[-1])
    has_to_end = log.exit_code is not None and server.state not in ENDED and is_last
    if not rows and not has_to_end:
        return 0
    end: dict[str, Any] = {} if log.exit_code is None else {"complete": True, "exitcode": log.exit_code}
    if log.is_preempting:
        end["preempting"] = True
    summary = {"offset": 0, "content": [json.dumps(_merged(server.summary, log.summary))]}
    offset, total = server.count, server.count + len(rows)
    for batch in _batches(rows):
        files = {HISTORY: {"offset": offset, "content": batch}}
        offset += len(batch)
        # The end goes with the last rows: where they are it is too.
        post({"files": files} if offset < total else {"files": {**files, SUMMARY: summary}, **end})
    if not rows:
        post({"files": {SUMMARY: summary}, **end})
    deadline = time.monotonic() + CONFIRM_SECONDS
    while (after := ask()) is None or after.count < total:
        if time.monotonic() > deadline:
            raise RowsError(f"W&B shows {after.count if after else 0} of {total} rows after the upload; try again")
        time.sleep(1)
    return len(rows)


def missing(rows: Sequence[dict[str, Any]], server: AtServer) -> Sequence[dict[str, Any]]:
    """The rows that the server lacks. Raises RowsError unless they are sure to follow those that it has."""
    steps = [row.get("_step") for row in rows]
    if not rows:
        return rows
    first = steps[0]
    if not isinstance(first, int) or steps != list(range(first, first + len(rows))):
        raise RowsError(
            "its rows aren't numbered one by one (log(..., step=...)?): nobody knows which of them W&B lacks"
        )
    if server.count >= first + len(rows):
        return []
    if server.count < first:
        raise RowsError(f"W&B has {server.count} rows, the folder begins with row {first}: those between are elsewhere")
    if server.count:
        same = rows[server.count - 1 - first] if server.count > first else {"_step": first - 1}
        if not _is_same(server.last, same):
            raise RowsError(f"row {server.count - 1} in W&B is another than in the folder: the run went on elsewhere")
    return rows[server.count - first :]


def parse_answer(answer: dict[str, Any]) -> AtServer | None:
    """What the answer to QUESTION says; None where there is no such run."""
    bucket = (answer.get("model") or {}).get("bucket")
    if bucket is None:
        return None
    tail = json.loads(bucket["historyTail"] or "[]")
    return AtServer(
        count=int(bucket["historyLineCount"] or 0),
        last=json.loads(tail[-1]) if tail else {},
        summary=json.loads(bucket["summaryMetrics"] or "{}"),
        state=str(bucket["state"]),
    )


def _journaled(folder: Path, logs: Mapping[str, TransactionLog]) -> TransactionLog | None:
    """All rows of the training's own run, from its journal: of those that wandb's files lack nothing else is left."""
    identity = identities.read(folder)
    if identity is None or identity.mode != "online":
        return None
    rows = {
        line["_step"]: {name: value for name, value in line.items() if name != "_row" and is_plain(value)}
        for line, _ in Journal(folder / JOURNAL).lines()
        if line["_row"] >= identity.first_row
    }
    if not rows or sorted(rows) != list(range(min(rows), min(rows) + len(rows))):
        return None
    log = logs.get(identity.run_id)
    for row in log.rows if log is not None else ():
        if row.get("_step") in rows and row.get("_timestamp") == rows[row["_step"]]["_timestamp"]:
            rows[row["_step"]] = row  # has tables too
    summary: dict[str, Any] = {}
    for step in sorted(rows):
        summary |= rows[step]
    return TransactionLog(
        folder=folder,
        entity=identity.entity or "",
        project=identity.project or "",
        run_id=identity.run_id,
        started_at=log.started_at if log is not None else rows[min(rows)]["_timestamp"],
        rows=[rows[step] for step in sorted(rows)],
        summary=_merged(summary, log.summary if log is not None else {}),
        exit_code=identity.exit_code,
        is_preempting=log is not None and log.is_preempting,
    )


def is_plain(value: Any) -> bool:
    """Whether a value of the journal is one of a row; tables and charts are files beside it."""
    return not isinstance(value, dict) or value.get("_type") not in ("table", "chart")


def _is_same(at_server: dict[str, Any], row: dict[str, Any]) -> bool:
    return all(at_server.get(name) == row[name] for name in ("_step", "_timestamp") if name in row)


def _batches(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    batch: list[str] = []
    for line in map(json.dumps, rows):
        if batch and (len(batch) == BATCH_ROWS or sum(map(len, batch)) + len(line) > BATCH_CHARACTERS):
            yield batch
            batch = []
        batch.append(line)
    if batch:
        yield batch


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The server's summary with the run's over it; `_wandb` and other nested values name by name."""
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name)
        merged[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged
