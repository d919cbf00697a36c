"""
What `harness sync` brings to the server, each row once.

An offline run, while it is written and after, and what online runs could not deliver.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.errors import DeliveryError, RowsError, SyncError, UnreachableError
from harness.files import write_whole
from harness.tracking.artifacts.staging import RECORD_FILE, STAGING_FOLDER, Staged, waiting
from harness.tracking.artifacts.upload import deliver_staged, versions_of
from harness.tracking.client import REOPEN_RUN, execute, one_line, server_answers
from harness.tracking.rows.events import is_own, is_same_row, num_beyond
from harness.tracking.rows.journal import JOURNAL_FILE, Journal, RowCount
from harness.tracking.rows.server import (
    AtServer,
    Connection,
    connection,
    deliver_rows,
    is_plain,
    online_files,
    online_logs,
    sync_without_rows,
)
from harness.tracking.rows.wandb_file import LogReader, TransactionLog, mark_synced, read_records
from harness.tracking.run.identity import Identity

logger = logging.getLogger(__name__)

SENT_FILE = "wandb_sync.json"
FOLDERS_IN_FILE = "lives"  # as the first versions called them there


@dataclass
class Sent:
    """
    What has been sent to the server, in `wandb_sync.json`.

    - first_row: the number in W&B of our first row, None if it is not known yet.
    - folders: for each offline run folder the number of records and the exit code that went with `wandb sync`, and the
      number of its rows; zeros: only its beginning was sent.
    """

    run_id: str
    first_row: int | None = None
    folders: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def read(cls, output_dir: Path, run_id: str) -> Sent:
        """Return what is noted of this run. Raises RowsError if the file can't be read, since all would go twice."""
        try:
            values = json.loads((output_dir / SENT_FILE).read_text(encoding="utf-8"))
            found = cls(run_id=values["run_id"], first_row=values["first_row"], folders=values[FOLDERS_IN_FILE])
        except FileNotFoundError:
            return cls(run_id=run_id)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RowsError(f"{output_dir / SENT_FILE} can't be read: {one_line(error)}") from error
        return found if found.run_id == run_id else cls(run_id=run_id)

    def write(self, output_dir: Path) -> None:
        """Write it, whole or not at all. Raises OSError."""
        values = {"run_id": self.run_id, "first_row": self.first_row, FOLDERS_IN_FILE: self.folders}
        write_whole(output_dir / SENT_FILE, json.dumps(values, indent=2) + "\n")


@dataclass
class Reading:
    """What has been read of a run's files while they are written, so that each look at it reads what is new."""

    logs: dict[Path, LogReader] = field(default_factory=dict)
    rows: RowCount | None = None

    def log(self, path: Path) -> TransactionLog | None:
        """Return what a .wandb file holds, as `read_log` does."""
        return self.logs.setdefault(path, LogReader(path)).read()

    def num_journaled(self, output_dir: Path, identity: Identity) -> int:
        """Return how many rows of the run are in the journal."""
        first = {"first_row": identity.first_row, "first_step": identity.steps_elsewhere}
        if self.rows is None or first != {"first_row": self.rows.first_row, "first_step": self.rows.first_step}:
            self.rows = RowCount(Journal(output_dir / JOURNAL_FILE), **first)
        return self.rows.read()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """After a delivery: rows and artifacts that W&B has, those that are on this disk alone, and what went wrong."""

    rows: int
    unsent_rows: int
    num_delivered: int
    num_waiting: int
    problems: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to bring."""
        return not (self.unsent_rows or self.num_waiting or self.problems)


class OfflineRun:
    """
    The offline run of an output_dir. Only its own file is written there, and what W&B has confirmed is unstaged.

    The order is: what makes the run, its rows by number, the rest of each attempt that is over, then artifacts.
    `reading` is what has been read of its files: a later look at the run takes it over.
    """

    def __init__(self, output_dir: Path, identity: Identity) -> None:
        self.output_dir, self.identity = output_dir, identity
        self.reading = Reading()
        self._logs: dict[Path, TransactionLog] = {}
        self._problems: list[str] = []

    def _read(self) -> None:
        for path in self.files():
            try:
                log = self.reading.log(path)
            except (OSError, ValueError) as error:
                self._problems.append(f"{path} can't be read: {one_line(error)}")
                continue
            if log is not None:  # else an attempt that was killed before it had written its run
                self._logs[path] = log
        self._logs = dict(sorted(self._logs.items(), key=lambda each: each[1].started_at))

    def files(self) -> list[Path]:
        """Return the .wandb files of its attempts."""
        listed = {(self.output_dir / name).resolve() for name in self.identity.offline_folders}
        listed |= {path.resolve() for path in (self.output_dir / "wandb").glob("offline-run-*")}
        paths = [folder / f"run-{self.identity.run_id}.wandb" for folder in listed]
        return sorted(path for path in paths if path.is_file())

    def deliver(self, api: Any, *, is_over: bool, is_finished: bool, lock: int | None) -> Outcome:
        """
        Bring all that is there. `is_over`: none is running; `is_finished`: none will. `lock`: see sync_without_rows.

        Raises RowsError, SyncError, and what wandb, requests and the disk raise.
        """
        self._read()
        sent = Sent.read(self.output_dir, self.identity.run_id)
        if not self._logs:
            return self._outcome(rows=sum(rows for _, _, rows in sent.folders.values()), num_delivered=0)
        last = list(self._logs.values())[-1]
        at = connection(api, last)
        server = at.ask()
        if server is None and sent.folders:
            raise RowsError(f"W&B has the run no more; to bring all of it again delete {self.output_dir / SENT_FILE}")
        if sent.first_row is None:
            sent.first_row = self._first_row(server, at)
            sent.write(self.output_dir)
        # Folders that were brought may be deleted afterwards (`wandb clean`).
        names = [path.parent.name for path in self._logs]
        gone = sum(rows for name, (_, _, rows) in sent.folders.items() if name not in names)
        log = self._joined(sent.first_row + gone, is_over=is_over, is_finished=is_finished)
        server = self._send_attempts(api, sent, server, ask=at.ask, is_over=is_over, lock=lock)
        total = sent.first_row + gone + len(log.rows)
        has_more = server.count < total
        if server.state != "running" and (has_more or not is_over):
            entity = log.entity or api.default_entity
            variables = {"entity": entity, "project": log.project, "name": log.run_id}
            execute(api, REOPEN_RUN, variables)
        deliver_rows(log, at)
        after = at.ask()
        is_last = after is not None and bool(log.rows) and is_same_row(after.last, log.rows[-1])
        if after is None or after.count < total or (after.count > total and is_last):
            self._problems.append(f"W&B has {after.count if after else 0} rows, {total} were brought there")
        else:  # for `wandb sync`, which would bring them once more
            over = [path.parent for path in self._logs if sent.folders.get(path.parent.name, [0])[0]]
            mark_synced(over, self.identity.run_id)
        return self._outcome(rows=gone + len(log.rows), num_delivered=self._send_artifacts(api, is_over=is_over))

    def _first_row(self, server: AtServer | None, at: Connection) -> int:
        """The number in W&B of our first row: what was there before us, and what `wandb sync` has brought of ours."""
        before, count = self.identity.steps_elsewhere, 0 if server is None else server.count
        if count < before:
            raise RowsError(
                f"W&B has {count} rows of this run, which goes on behind row {before - 1}: first bring the folder that "
                "its checkpoint is from"
            )
        if server is None or server.count == 0:
            return 0
        times = [row.get("_timestamp") for log in self._logs.values() for row in log.rows]
        if (latest := server.last.get("_timestamp")) in times:
            first = server.count - 1 - times.index(latest)
            if first >= 0:
                return first
        elif before:  # what the other folder sent at the end of its training, or more
            return before if num_beyond(filter(is_own, at.read(before, count))) else count
        elif next(iter(self._logs.values())).resumes:
            return server.count
        raise RowsError(f"W&B has {server.count} rows of a run of this id, and they are not of this folder")

    def _joined(self, first_row: int, *, is_over: bool, is_finished: bool) -> TransactionLog:
        """Return all attempts as one, rows numbered as in W&B; of a finished run those of the journal alone too."""
        rows: list[dict[str, Any]] = []
        summary: dict[str, Any] = {}
        logs = list(self._logs.values())
        for log in logs:
            steps = [row.get("_step") for row in log.rows]
            if steps != list(range(len(steps))):
                raise RowsError(f"the rows in {log.folder} aren't numbered one by one; `wandb sync` can bring them")
            first = first_row + len(rows)  # as in W&B; a long run's rows are not copied where they have these numbers
            rows += log.rows if first == 0 else [{**row, "_step": first + step} for step, row in enumerate(log.rows)]
            summary |= log.summary
        if is_finished:
            latest = max((row.get("_timestamp", 0.0) for row in rows), default=0.0)
            for line in self._journaled():
                if line["_timestamp"] > latest:
                    row = {name: value for name, value in line.items() if name != "_row" and is_plain(value)}
                    rows.append({**row, "_step": first_row + len(rows)})
                    summary |= row
        if rows:
            summary["_step"] = rows[-1]["_step"]
        exit_code = (1 if logs[-1].exit_code is None else logs[-1].exit_code) if is_over else None
        return replace(logs[-1], rows=rows, summary=summary, exit_code=exit_code)

    def _send_attempts(
        self,
        api: Any,
        sent: Sent,
        server: AtServer | None,
        *,
        ask: Callable[[], AtServer | None],
        is_over: bool,
        lock: int | None,
    ) -> AtServer:
        """Send what `wandb sync` sends of each attempt, once when it has begun and once when it is over."""
        last = list(self._logs)[-1]
        for path, log in self._logs.items():
            before = sent.folders.get(path.parent.name)
            has_ended = is_over or path != last
            content = [*_content(path), len(log.rows)] if has_ended else [0, 0, 0]
            if before is None and path.with_name(f"{path.name}.synced").exists():  # by the user's own `wandb sync`
                sent.folders[path.parent.name] = content
                sent.write(self.output_dir)
                continue
            if server is not None and (before == content or (before is not None and not has_ended)):
                continue
            resumes = server is not None
            server, artifacts = sync_without_rows(path, ask=ask, is_over=has_ended, resumes=resumes, lock=lock)
            self._verify(api, artifacts)
            sent.folders[path.parent.name] = content
            sent.write(self.output_dir)
        if server is None:
            raise RowsError("W&B does not have the run, though its files are marked as synced (.synced)")
        return server

    def _verify(self, api: Any, artifacts: list[Any]) -> None:
        """See that the server has these artifacts: `wandb sync` does not say so if it has refused them."""
        for artifact in artifacts:
            entity = artifact.entity or api.default_entity
            found = versions_of(api, f"{entity}/{artifact.project}/{artifact.name}", artifact.type)
            if artifact.digest not in [version.digest for version in found]:
                raise SyncError(f"`wandb sync` said nothing, but W&B does not have {artifact.name}")

    def _staged(self) -> list[Staged]:
        return [staged for staged in waiting(self.output_dir / STAGING_FOLDER) if staged.run_id == self.identity.run_id]

    def _send_artifacts(self, api: Any, *, is_over: bool) -> int:
        # While an attempt runs one may be half made, or given up for a newer one meanwhile.
        whole = [each for each in self._staged() if is_over or all(each.path_of(name).exists() for name in each.files)]
        return _send_artifacts(api, whole, self._problems)

    def _journaled(self) -> list[dict[str, Any]]:
        lines = Journal(self.output_dir / JOURNAL_FILE).lines()
        first_row, first_step = self.identity.first_row, self.identity.steps_elsewhere
        return [line for line, _ in lines if line["_row"] >= first_row and line["_step"] >= first_step]

    def _outcome(self, *, rows: int, num_delivered: int) -> Outcome:
        # A row that wandb's process had not written when it was killed is in the journal; the next attempt sends it.
        return Outcome(
            rows=rows,
            unsent_rows=max(self.reading.num_journaled(self.output_dir, self.identity) - rows, 0),
            num_delivered=num_delivered,
            num_waiting=len(self._staged()),
            problems=self._problems,
        )


class OnlineRuns:
    """
    What online runs have left in a folder: rows that W&B lacks, and staged artifacts. The runs are over.

    `identity`: of the training whose folder this is, if it is one. An offline run's artifacts are left to OfflineRun.
    """

    def __init__(self, output_dir: Path, identity: Identity | None) -> None:
        self.output_dir, self.identity = output_dir, identity
        self._problems: list[str] = []

    def files(self) -> list[Path]:
        """The .wandb files of the runs, the rows of the training, and what is staged."""
        records = [staged.folder / RECORD_FILE for staged in self._staged()]
        journal = self.output_dir / JOURNAL_FILE
        has_journal = self.identity is not None and self.identity.mode == "online" and journal.is_file()
        return [*online_files(self.output_dir), *([journal] if has_journal else []), *records]

    def deliver(self, api: Any) -> Outcome:
        """Bring all that is there, one after the other whatever becomes of one. Raises UnreachableError."""
        logs, unreadable = online_logs(self.output_dir)
        self._problems += unreadable
        rows = sum(self._deliver_rows(api, log) for log in logs)
        num_delivered = _send_artifacts(api, self._staged(), self._problems)
        left = len(self._staged())
        return Outcome(rows=rows, unsent_rows=0, num_delivered=num_delivered, num_waiting=left, problems=self._problems)

    def _deliver_rows(self, api: Any, log: TransactionLog) -> int:
        """Bring the rows of a run; returns how many W&B has of it then."""
        try:
            deliver_rows(log, connection(api, log))
        except Exception as error:  # wandb and its transports raise many types
            reason = str(error) if isinstance(error, RowsError) else one_line(error)
            self._problems.append(f"the rows of {log.project}/{log.run_id} are not delivered: {reason}")
            _check_server(api)
            return 0
        return int(log.rows[-1]["_step"]) + 1 if log.rows else 0

    def _staged(self) -> list[Staged]:
        offline = self.identity.run_id if self.identity is not None and self.identity.mode != "online" else None
        return [staged for staged in waiting(self.output_dir / STAGING_FOLDER) if staged.run_id != offline]


def _send_artifacts(api: Any, staged: list[Staged], problems: list[str]) -> int:
    """Bring staged artifacts in their order; returns how many arrived. Raises UnreachableError."""
    count = 0
    for each in staged:
        try:
            deliver_staged(api, each)
            count += 1
        except Exception as error:  # wandb and its transports raise many types; the next one is tried all the same
            is_own = isinstance(error, DeliveryError)
            if is_own or each.is_waiting:  # else its training has given it up for a newer one
                reason = str(error) if is_own else one_line(error)
                problems.append(f"{each.name} ({each.aliases[-1]}) is not delivered: {reason}")
            _check_server(api)
    return count


def _check_server(api: Any) -> None:
    base_url = api.settings["base_url"]
    if not server_answers(base_url):
        raise UnreachableError(f"W&B can't be reached at {base_url} any more; what is left stays where it is.")


def _content(path: Path) -> list[int]:
    """Return how much an attempt has: records without the end's, which a later one may add, and its exit code."""
    kinds = [(record.WhichOneof("record_type"), record) for record, _ in read_records(path.read_bytes())]
    codes = [record.exit.exit_code for kind, record in kinds if kind == "exit"]
    return [sum(kind != "exit" for kind, _ in kinds), codes[0] if codes else 1]
