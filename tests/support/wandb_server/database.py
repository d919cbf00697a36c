"""The state of the server in one SQLite file, and file contents beside it: both survive a SIGKILL."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TABLES = """
CREATE TABLE IF NOT EXISTS projects (
    id INTEGER PRIMARY KEY, entity TEXT NOT NULL, name TEXT NOT NULL, description TEXT, created_at TEXT,
    UNIQUE (entity, name)
);
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, project_id INTEGER NOT NULL, name TEXT NOT NULL, display_name TEXT,
    description TEXT, notes TEXT, config TEXT NOT NULL DEFAULT '{}', summary_metrics TEXT NOT NULL DEFAULT '{}',
    tags TEXT NOT NULL DEFAULT '[]', group_name TEXT, job_type TEXT, host TEXT, program TEXT, repo TEXT,
    git_commit TEXT, sweep_name TEXT, state TEXT NOT NULL DEFAULT 'running', exit_code INTEGER,
    preempting INTEGER NOT NULL DEFAULT 0, stop_requested INTEGER NOT NULL DEFAULT 0, created_at TEXT,
    heartbeat REAL, UNIQUE (project_id, name)
);
CREATE TABLE IF NOT EXISTS lines (
    run_id INTEGER, file TEXT, number INTEGER, content TEXT, PRIMARY KEY (run_id, file, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS run_files (
    id INTEGER PRIMARY KEY, run_id INTEGER, name TEXT, size INTEGER, md5 TEXT, updated_at TEXT, UNIQUE (run_id, name)
);
CREATE TABLE IF NOT EXISTS sweeps (
    id INTEGER PRIMARY KEY, project_id INTEGER NOT NULL, name TEXT NOT NULL, config TEXT NOT NULL, description TEXT,
    state TEXT NOT NULL DEFAULT 'PENDING', created_at TEXT
);
CREATE TABLE IF NOT EXISTS agents (id INTEGER PRIMARY KEY, sweep_id INTEGER NOT NULL, host TEXT);
CREATE TABLE IF NOT EXISTS alerts (id INTEGER PRIMARY KEY, run_id INTEGER, title TEXT, text TEXT, severity TEXT);
CREATE TABLE IF NOT EXISTS collections (
    id INTEGER PRIMARY KEY, project_id INTEGER NOT NULL, name TEXT NOT NULL, kind TEXT NOT NULL, type TEXT NOT NULL,
    description TEXT, created_at TEXT, updated_at TEXT, UNIQUE (project_id, name)
);
CREATE TABLE IF NOT EXISTS artifacts (
    id INTEGER PRIMARY KEY, collection_id INTEGER NOT NULL, run_id INTEGER, client_id TEXT, digest TEXT,
    digest_algorithm TEXT, state TEXT NOT NULL, version_index INTEGER, description TEXT, metadata TEXT,
    tags TEXT NOT NULL DEFAULT '[]', ttl_duration_seconds INTEGER, history_step INTEGER,
    wanted_aliases TEXT NOT NULL DEFAULT '[]', created_at TEXT, updated_at TEXT
);
CREATE TABLE IF NOT EXISTS manifests (id INTEGER PRIMARY KEY, artifact_id INTEGER, name TEXT, digest TEXT);
CREATE TABLE IF NOT EXISTS memberships (
    id INTEGER PRIMARY KEY, collection_id INTEGER, artifact_id INTEGER, version_index INTEGER, created_at TEXT,
    UNIQUE (collection_id, artifact_id)
);
CREATE TABLE IF NOT EXISTS aliases (
    id INTEGER PRIMARY KEY, collection_id INTEGER, alias TEXT, artifact_id INTEGER, UNIQUE (collection_id, alias)
);
CREATE TABLE IF NOT EXISTS uses (artifact_id INTEGER, run_id INTEGER, used_as TEXT, UNIQUE (artifact_id, run_id));
"""


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class Refused(Exception):  # noqa: N818 - an answer, not a fault of the server
    """What W&B answers with an error on purpose: the client was wrong."""


class Database:
    """A few statements over sqlite3; rows are plain dicts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._connection = sqlite3.connect(folder / "state.sqlite", isolation_level=None, timeout=30)
        self._connection.row_factory = lambda cursor, row: dict(
            zip((column[0] for column in cursor.description), row, strict=True)
        )
        # Off: what reached the kernel survives the death of the process; power cuts are not tested here.
        self._connection.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; {TABLES}")

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, also when the process is killed inside."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def all(self, statement: str, *values: Any) -> list[Row]:
        return self._connection.execute(statement, values).fetchall()

    def one(self, statement: str, *values: Any) -> Row | None:
        return self._connection.execute(statement, values).fetchone()

    def value(self, statement: str, *values: Any) -> Any:
        """The first column of the first row; None without a row."""
        row = self.one(statement, *values)
        return next(iter(row.values())) if row else None

    def get(self, table: str, number: int | None) -> Row | None:
        return self.one(f"SELECT * FROM {table} WHERE id = ?", number)  # noqa: S608 - our own names

    def insert(self, table: str, **values: Any) -> int:
        """Write a row, in place of one that it would collide with. Returns its id."""
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        statement = f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({marks})"  # noqa: S608
        return int(self._connection.execute(statement, tuple(values.values())).lastrowid or 0)

    def update(self, table: str, number: int, **values: Any) -> None:
        if values:
            names = ", ".join(f"{name} = ?" for name in values)
            self._connection.execute(f"UPDATE {table} SET {names} WHERE id = ?", (*values.values(), number))  # noqa: S608

    def delete(self, table: str, **where: Any) -> None:
        names = " AND ".join(f"{name} = ?" for name in where)
        self._connection.execute(f"DELETE FROM {table} WHERE {names}", tuple(where.values()))  # noqa: S608

    def project(self, entity: str, name: str, *, create: bool = False) -> Row | None:
        found = self.one("SELECT * FROM projects WHERE entity = ? AND name = ?", entity, name)
        if found or not create:
            return found
        return self.get("projects", self.insert("projects", entity=entity, name=name, created_at=now()))
