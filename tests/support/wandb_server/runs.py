"""What happens to runs: created, resumed, streamed to, stopped, over."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .database import Database, Refused, Row, now

HISTORY, EVENTS, OUTPUT, SUMMARY = "wandb-history.jsonl", "wandb-events.jsonl", "output.log", "wandb-summary.json"
COLUMNS = {"commit": "git_commit", "job_program": "program", "job_repo": "repo", "sweep": "sweep_name"}
PLAIN = (
    *("group_name", "description", "display_name", "notes", "host", "job_type", "config", "summary_metrics"),
    *("job_program", "job_repo", "commit", "sweep"),
)


class Runs:
    """The runs of all projects. One not heard of for `silence_seconds`, 5 minutes in the cloud, has crashed."""

    def __init__(self, database: Database, silence_seconds: float) -> None:
        self._database = database
        self._silence_seconds = silence_seconds

    def find(self, entity: str, project: str, name: str) -> Row | None:
        return self._database.one(
            "SELECT runs.* FROM runs JOIN projects ON projects.id = project_id"
            " WHERE entity = ? AND projects.name = ? AND runs.name = ?",
            *(entity, project, name),
        )

    def require(self, entity: str, project: str, name: str) -> Row:
        found = self.find(entity, project, name)
        if not found:
            raise Refused(f"run {entity}/{project}/{name} not found")
        return found

    def upsert(self, given: Mapping[str, Any], *, run_id: int | None, entity: str) -> tuple[Row, bool]:
        """Create or change a run, found by its id or by project and name. Returns it and whether it is new.

        As W&B does, the config given replaces the stored one: merging on a resume is the client's work.
        """
        values = {COLUMNS.get(name, name): given[name] for name in PLAIN if given.get(name) is not None}
        if given.get("tags") is not None:
            values["tags"] = json.dumps(given["tags"])
        if run_id is not None:
            found, inserted = self._database.get("runs", run_id), False
            if not found:
                raise Refused("run not found")
        else:
            found, inserted = self._named(entity, given.get("model_name") or "uncategorized", given.get("name"))
            values |= {"state": given.get("state") or "running", "heartbeat": time.time()}
            if found["exit_code"] is not None:  # over: this begins it again
                values |= {"exit_code": None, "preempting": 0, "stop_requested": 0}
        self._database.update("runs", found["id"], **values)
        changed = self._database.get("runs", found["id"])
        assert changed
        return changed, inserted

    def _named(self, entity: str, project: str, name: str | None) -> tuple[Row, bool]:
        where = self._database.project(entity, project, create=True)
        assert where
        count = self._database.value("SELECT COUNT(*) FROM runs WHERE project_id = ?", where["id"]) + 1
        found = self._database.one("SELECT * FROM runs WHERE project_id = ? AND name = ?", where["id"], name)
        if found:
            return found, False
        values = {"name": name or f"unnamed{count}", "display_name": f"test-run-{count}", "created_at": now()}
        row = self._database.get("runs", self._database.insert("runs", project_id=where["id"], **values))
        assert row
        return row, True

    def stream(self, run: Row, body: Mapping[str, Any]) -> None:
        """Take one file_stream request. Lines have numbers, so a repeated request changes nothing."""
        changes: dict[str, Any] = {"heartbeat": time.time()}
        for file, chunk in (body.get("files") or {}).items():
            if file == SUMMARY:
                changes["summary_metrics"] = quoted(chunk["content"][-1])
                continue
            for number, content in enumerate(chunk["content"], chunk.get("offset") or 0):
                line = content if file == OUTPUT else quoted(content)
                self._database.insert("lines", run_id=run["id"], file=file, number=number, content=line)
        if body.get("preempting"):
            changes["preempting"] = 1
        if body.get("complete"):
            code = body.get("exitcode") or 0
            preempting = run["preempting"] or changes.get("preempting")
            changes |= {"exit_code": code, "state": _end(code, preempting, run["stop_requested"])}
        elif body.get("files") or body.get("uploaded"):
            changes["state"] = "running"
        self._database.update("runs", run["id"], **changes)

    def state(self, run: Row) -> str:
        if run["state"] == "running" and time.time() - (run["heartbeat"] or 0) > self._silence_seconds:
            return "preempted" if run["preempting"] else "crashed"
        return str(run["state"])

    def lines(self, run: Row, file: str) -> list[str]:
        found = self._database.all(
            "SELECT content FROM lines WHERE run_id = ? AND file = ? ORDER BY number", run["id"], file
        )
        return [row["content"] for row in found]

    def count(self, run: Row, file: str) -> int:
        """The number of the first line to come."""
        last = self._database.value("SELECT MAX(number) FROM lines WHERE run_id = ? AND file = ?", run["id"], file)
        return 0 if last is None else last + 1

    def tail(self, run: Row, file: str) -> str:
        """The last line, as W&B gives it: the JSON of a list of lines."""
        found = self._database.all(
            "SELECT content FROM lines WHERE run_id = ? AND file = ? ORDER BY number DESC LIMIT 1", run["id"], file
        )
        return json.dumps([row["content"] for row in found])

    def rows(self, run: Row) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines(run, HISTORY)]

    def delete(self, run: Row) -> None:
        for table in ("lines", "run_files", "alerts"):
            self._database.delete(table, run_id=run["id"])
        self._database.delete("runs", id=run["id"])

    def file_path(self, run: Row, name: str) -> Path:
        return below(self._database.folder / "runs" / str(run["id"]), name)

    def add_file(self, run_id: int, name: str, size: int, md5: str) -> None:
        self._database.insert("run_files", run_id=run_id, name=name, size=size, md5=md5, updated_at=now())

    def files(self, run: Row) -> list[Row]:
        return self._database.all("SELECT * FROM run_files WHERE run_id = ? ORDER BY name", run["id"])


def _end(code: int, preempting: int | None, stop_requested: int) -> str:
    if code == 0:
        return "finished"
    if preempting:
        return "preempted"
    return "killed" if stop_requested else "failed"


def quoted(content: str) -> str:
    """JSON with NaN and Infinity as strings, which is how W&B gives them back."""
    if "NaN" not in content and "Infinity" not in content:
        return content
    return json.dumps(_quote(json.loads(content)))


def _quote(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _quote(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_quote(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value


def below(folder: Path, name: str) -> Path:
    """The place of a file that a client named. Raises Refused if that is outside `folder`."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise Refused(f"{name} leads out of the folder")
    return path
