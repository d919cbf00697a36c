"""
A run as W&B's server has it: its rows counted, those it lacks sent from this disk, each exactly once.

`wandb sync` passes online runs over, and with --include-online it sends all rows again behind those that are there.
Of an offline run it would send all rows of a file again if it were killed in between, and it stops at a file that a
kill has torn. So it gets a whole file of our own, without rows (`sync_without_rows`); those go by their numbers
(`deliver_rows`), and twice changes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import RowsError, SyncError
from harness.tracking import transfer
from harness.tracking.artifacts.staging import STAGING_FOLDER
from harness.tracking.client import (
    API_TIMEOUT_SECONDS,
    HISTORY_OF_RUN,
    ROWS_OF_RUN,
    ask_once,
    execute,
    installed,
    one_line,
)
from harness.tracking.damage import is_count, load_json
from harness.tracking.rows.beyond import Theirs
from harness.tracking.rows.events import is_own, is_same_row, num_beyond
from harness.tracking.rows.journal import JOURNAL_FILE, Journal
from harness.tracking.rows.wandb_file import (
    HEADER_BYTES,
    WRITER,
    TransactionLog,
    encode,
    read_log,
    read_records,
    read_rows,
)
from harness.tracking.run import identity as identities

logger = logging.getLogger(__name__)

HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
# Where the .wandb files of online runs are: in a run's folder, below wandb's, below an output_dir.
PATTERNS = ("run-*.wandb", "run-*/run-*.wandb", "wandb/run-*/run-*.wandb")
ENDED = ("finished", "failed", "killed", "preempted")
BATCH_ROWS, BATCH_CHARACTERS = 500, 2_000_000
PAGE_ROWS, READ_SECONDS = 500, 60.0
CONFIRM_SECONDS = 15.0
SYNC_TIMEOUT_SECONDS = 3600.0
SYNC_TRIES, END_SECONDS = 3, 3.0
# What makes a run and its charts; the rest of an attempt waits for its end.
SETUP = ("header", "run", "config", "environment", "telemetry", "metric")


@dataclass(frozen=True, kw_only=True)
class AtServer:
    """What W&B has of a run: the number of its rows, the last row, its summary, its state."""

    count: int
    last: dict[str, Any]
    summary: dict[str, Any]
    state: str


def rows_arrived(run: Any) -> tuple[int, int] | None:
    """
    Return how many rows the server has of an online run, or the file of an offline one, and the step behind the last.

    They are two numbers where the user gives steps (`log(..., step=...)`). None if it is unknown.
    """
    settings = run.settings
    try:
        if run.offline:
            count, step = 0, 0
            for row in read_rows(Path(settings.sync_file)):
                count, step = count + 1, int(row.get("_step", step)) + 1
            return count, step
        variables = {"entity": settings.entity, "project": settings.project, "run": settings.run_id}
        found = _parse_answer(ask_once(settings, ROWS_OF_RUN, variables))
        return None if found is None else (found.count, int(found.last.get("_step", found.count - 1)) + 1)
    except (OSError, ValueError, KeyError, TypeError) as error:  # requests raises OSErrors
        logger.debug("The rows that have arrived could not be counted: %s", error)
        return None


def rows_between(settings: Any, first: int, end: int) -> Iterator[dict[str, Any]]:
    """
    Yield the rows that the server has of a run from step `first` to before `end`, a page at a time.

    Raises OSError, also when it takes longer than READ_SECONDS in all, and ValueError, KeyError and TypeError for what
    is no answer.
    """
    run = {"entity": settings.entity, "project": settings.project, "run": settings.run_id}
    return _pages(lambda page: ask_once(settings, HISTORY_OF_RUN, {**run, **page}), first, end)


def num_behind(run: identities.Identity, step: int) -> int:
    """Return how many rows the server has of a run from a step on, without those of an end; 0 if it can't be asked."""
    import wandb

    settings = wandb.setup().settings.model_copy()
    settings.entity, settings.project, settings.run_id = run.entity, run.project, run.run_id
    variables = {"entity": run.entity, "project": run.project, "run": run.run_id}
    try:
        found = _parse_answer(ask_once(settings, ROWS_OF_RUN, variables))
        end = 0 if found is None else int(found.last.get("_step", -1)) + 1
        return num_beyond(filter(is_own, rows_between(settings, step, end)))
    except (OSError, ValueError, KeyError, TypeError) as error:  # requests raises OSErrors
        logger.debug("The rows behind the checkpoint could not be read: %s", error)
        return 0


def _pages(ask: Callable[[dict[str, Any]], dict[str, Any]], first: int, end: int) -> Iterator[dict[str, Any]]:
    deadline = time.monotonic() + READ_SECONDS
    for start in range(first, end, PAGE_ROWS):
        if time.monotonic() > deadline:
            raise TimeoutError(f"W&B took more than {READ_SECONDS:g} s")
        stop = min(start + PAGE_ROWS, end)
        lines = ask({"first": start, "end": stop, "count": PAGE_ROWS})["project"]["run"]["history"]
        rows = sorted(map(json.loads, lines), key=lambda row: int(row["_step"]))
        yield from (_with_floats(row) for row in rows if start <= row["_step"] < stop)


def _with_floats(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with numbers where W&B answers with the texts "NaN" and "Infinity": JSON has no such numbers."""
    return {name: float(value) if value in ("NaN", "Infinity", "-Infinity") else value for name, value in row.items()}


def online_files(folder: Path) -> list[Path]:
    """Return the .wandb files of the online runs in a folder."""
    paths = {path for pattern in PATTERNS for path in folder.absolute().glob(pattern)}
    return sorted(path for path in paths if path.parent.name.startswith("run-"))


def online_logs(folder: Path) -> tuple[list[TransactionLog], list[str]]:
    """Return the last attempt of each online run in a folder, oldest first, and why other files can't be read."""
    latest: dict[str, TransactionLog] = {}
    problems = []
    for path in online_files(folder):
        try:
            log = read_log(path)
        except (OSError, ValueError) as error:
            problems.append(f"{path} can't be read: {error}")
            continue
        # An attempt begins with the row that the server awaits: rows of those before are there, or were made again.
        if log is not None and (log.run_id not in latest or log.started_at > latest[log.run_id].started_at):
            latest[log.run_id] = log
    if (journaled := _journaled(folder, latest)) is not None:
        latest[journaled.run_id] = journaled
    return sorted(latest.values(), key=lambda log: log.started_at), problems


@dataclass(frozen=True, kw_only=True)
class Connection:
    """
    A run at the server. All of it raises what wandb, requests and the disk raise.

    - ask: what the server has of it, None if it has no such run; read: its rows from one step to before another.
    - post: sends a request of W&B's file stream.
    """

    ask: Callable[[], AtServer | None]
    read: Callable[[int, int], Iterator[dict[str, Any]]]
    post: Callable[[dict[str, Any]], None]


def connection(api: Any, log: TransactionLog) -> Connection:
    """Return what asks the server about a run and sends rows there."""
    entity = log.entity or api.default_entity
    base_url = api.settings["base_url"].rstrip("/")
    variables = {"entity": entity, "project": log.project, "run": log.run_id}
    address = f"{base_url}/files/{entity}/{log.project}/{log.run_id}/file_stream"

    def ask() -> AtServer | None:
        return _parse_answer(execute(api, ROWS_OF_RUN, variables))

    def post(body: dict[str, Any]) -> None:
        transfer.ask("POST", address, seconds=API_TIMEOUT_SECONDS, json=body, auth=("api", api.api_key)).check()

    def read(first: int, end: int) -> Iterator[dict[str, Any]]:
        return _pages(lambda page: execute(api, HISTORY_OF_RUN, {**variables, **page}), first, end)

    return Connection(ask=ask, read=read, post=post)


def deliver_rows(log: TransactionLog, at: Connection) -> int:
    """
    Send the rows that the server lacks, then the summary and how the run ended; returns how many rows it was.

    In W&B's file stream rows have numbers, so what is sent again after a kill writes the same rows to the same places.
    Raises RowsError before anything is sent if the two don't fit together.
    """
    server = at.ask()
    if server is None:
        raise RowsError("W&B does not have the run")
    rows = missing(log.rows, server, at.read)
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
        at.post({"files": files} if offset < total else {"files": {**files, SUMMARY: summary}, **end})
    if not rows:
        at.post({"files": {SUMMARY: summary}, **end})
    deadline = time.monotonic() + CONFIRM_SECONDS
    while (after := at.ask()) is None or after.count < total:
        if time.monotonic() > deadline:
            raise RowsError(f"W&B shows {after.count if after else 0} of {total} rows after the upload; try again")
        time.sleep(1)
    return len(rows)


def sync_without_rows(
    path: Path, *, ask: Callable[[], AtServer | None], is_over: bool, resumes: bool, lock: int | None
) -> tuple[AtServer, list[Any]]:
    """
    Send a .wandb file to the server without its rows; of an attempt that is not over only what makes the run.

    `resumes`: W&B has the run, and it goes on; else it is replaced. The file descriptor `lock` is inherited by `wandb
    sync`, which may outlive us. Returns what W&B then has of the run, and the artifact records that were sent.
    Raises SyncError, OSError and ValueError.
    """
    data = path.read_bytes()
    records = list(_chosen(data, is_over=is_over, resumes=resumes))
    content = data[:HEADER_BYTES] + encode(each.SerializeToString() for each in records)
    for _ in range(SYNC_TRIES):
        _wandb_sync_content(path, content, lock)
        server = _once_ended(ask)
        # The exit record goes last in the stream. wandb-core 0.31 starts a run's stream beside the reading of its file:
        # where that comes late, a file of a few records is over, nothing of the stream is sent, and the file counts as
        # synced. Then it may be sent once more: nothing of it is there.
        if server is not None and server.state in ENDED:
            return server, [each.artifact for each in records if each.WhichOneof("record_type") == "artifact"]
    lacks = "the run" if server is None else "the end"
    raise SyncError(f"`wandb sync` said nothing, but W&B lacks {lacks} of {path.parent.name}; try again")


def missing(
    rows: Sequence[dict[str, Any]], server: AtServer, read: Callable[[int, int], Iterator[dict[str, Any]]]
) -> Sequence[dict[str, Any]]:
    """
    Return the rows that the server lacks, with the numbers that they get there.

    What another folder has sent at the end of the training, before it went on here, takes numbers too. Raises
    RowsError unless the rows surely follow those that the server has.
    """
    steps = [row.get("_step") for row in rows]
    if not rows:
        return rows
    first = steps[0]
    if not isinstance(first, int) or steps != list(range(first, first + len(rows))):
        raise RowsError(
            "its rows aren't numbered one by one (log(..., step=...)?): nobody knows which of them W&B lacks"
        )
    if server.count < first:
        raise RowsError(f"W&B has {server.count} rows, the folder begins with row {first}: those between are elsewhere")
    both = min(server.count - first, len(rows))  # W&B has rows of these numbers
    if not both:
        if server.count and server.last.get("_step") != first - 1:
            raise RowsError(f"row {server.count - 1} in W&B is another than in the folder: the run went on elsewhere")
        return rows
    number = first + both - 1
    theirs = server.last if number + 1 == server.count else next(read(number, number + 1), None)
    if theirs is None or (theirs.get("_step") == number and is_same_row(rows[both - 1], theirs)):
        return rows[both:]
    if (lacks := _behind_ends(rows, Theirs(read(first, server.count)), count=server.count)) is None:
        raise RowsError(f"row {number} in W&B is another than in the folder: the run went on elsewhere")
    return lacks


def _behind_ends(rows: Sequence[dict[str, Any]], theirs: Theirs, *, count: int) -> list[dict[str, Any]] | None:
    """Return the rows that are not among W&B's, which are `count`, with the numbers they get; None for other rows."""
    lacks: list[dict[str, Any]] = []
    for row in rows:
        other = theirs.behind_ends(row)
        if theirs.reason:
            raise RowsError(f"the rows that W&B has can't be read: {theirs.reason}")
        if other is None:
            lacks.append({**row, "_step": count + len(lacks)})
        elif is_same_row(row, other):
            theirs.take()
        else:
            return None
    return lacks


def _parse_answer(answer: Any) -> AtServer | None:
    """Read the answer to ROWS_OF_RUN; None where there is no such run. Raises ValueError for what is no answer."""
    try:
        bucket = (answer["model"] or {}).get("bucket")
        if bucket is None:
            return None
        tail = load_json((bucket["historyTail"] or "[]").encode())
        last = load_json(tail[-1].encode()) if tail else {}
        summary = load_json((bucket["summaryMetrics"] or "{}").encode())
        count = int(bucket["historyLineCount"] or 0)
        if not (isinstance(last, dict) and isinstance(summary, dict) and is_count(count)):
            raise ValueError("another form")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"W&B's answer about the run can't be read: {one_line(error)}") from error
    return AtServer(count=count, last=last, summary=summary, state=str(bucket["state"]))


def _journaled(folder: Path, logs: Mapping[str, TransactionLog]) -> TransactionLog | None:
    """Return the training's own run with all rows of its journal, the only place of rows that wandb's files lack."""
    identity = identities.read(folder)
    if identity is None or identity.mode != "online":
        return None
    rows = {
        line["_step"]: {name: value for name, value in line.items() if name != "_row" and is_plain(value)}
        for line, _ in Journal(folder / JOURNAL_FILE).lines()
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
    """Whether a value of the journal stands in the row itself; tables and charts are files beside it."""
    return not isinstance(value, dict) or value.get("_type") not in ("table", "chart")


def _is_same(at_server: dict[str, Any], row: dict[str, Any]) -> bool:
    return all(at_server.get(name) == row[name] for name in ("_step", "_timestamp") if name in row)


def _batches(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for line in map(json.dumps, rows):
        if batch and (len(batch) == BATCH_ROWS or size + len(line) > BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line)
    if batch:
        yield batch


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the server's summary with the run's over it, nested values (`_wandb`) name by name."""
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name)
        merged[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _chosen(data: bytes, *, is_over: bool, resumes: bool) -> Iterator[Any]:
    for record, _ in read_records(data):
        kind = record.WhichOneof("record_type")
        if kind == "history" or (not is_over and kind not in SETUP):
            continue
        if kind == "artifact" and _is_staged(record.artifact):
            continue
        if kind == "run":
            record.run.resume = resumes
        yield record


def _is_staged(artifact: Any) -> bool:
    """Whether its files are those of a staged artifact, which goes by itself and is verified."""
    places = [entry.local_path for entry in artifact.manifest.contents if entry.local_path]
    return bool(places) and all(STAGING_FOLDER in Path(place).parts for place in places)


def _once_ended(ask: Callable[[], AtServer | None]) -> AtServer | None:
    """Return what the server has of a run when its end is there; what it has then if that does not come."""
    deadline = time.monotonic() + END_SECONDS
    while ((server := ask()) is None or server.state not in ENDED) and time.monotonic() < deadline:
        time.sleep(0.5)
    return server


def _wandb_sync_content(path: Path, content: bytes, lock: int | None) -> None:
    """Let `wandb sync` send a .wandb file of this content in place of the one at `path`, with the files beside it."""
    with tempfile.TemporaryDirectory(prefix="harness-sync-") as temporary:
        folder = Path(temporary) / path.parent.name
        folder.mkdir()
        (folder / "files").symlink_to((path.parent / "files").absolute())
        (folder / path.name).write_bytes(content)
        _wandb_sync(folder, lock)


def _wandb_sync(folder: Path, lock: int | None) -> None:
    # WANDB_MODE=offline in a shell is meant for trainings.
    variables = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_RUN_ID")}
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    try:
        done = subprocess.run(  # noqa: S603 - ourselves
            command,
            env=variables | {"WANDB_SILENT": "false"},
            cwd=folder.parent,  # it leaves logs where it is started
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SYNC_TIMEOUT_SECONDS,
            check=False,
            pass_fds=() if lock is None else (lock,),
        )
    except subprocess.TimeoutExpired as error:
        raise SyncError(f"`wandb sync` did not end within {SYNC_TIMEOUT_SECONDS:g} s") from error
    said = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line or "rror:" in line]
    if done.returncode != 0 or said:
        reason = " ".join(said)[-300:] or f"exit code {done.returncode}"
        raise SyncError(f"`wandb sync` of wandb {installed()} failed (known: {WRITER}): {reason}")
