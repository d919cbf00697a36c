"""The rows of a training that W&B does not get: in the journal alone, each once over all attempts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.tracking.rows.history import History
from harness.tracking.rows.journal import JOURNAL_FILE, Journal


class LocalRows:
    """
    Counts the rows from the beginning of the training and writes them to the journal. On rank zero only.

    A resume cuts what the checkpoint has not counted: the training makes those rows again. A W&B run that the
    checkpoint names stays named in the next one, so that a later attempt can bring its rows there.
    """

    def __init__(self, output_dir: Path, *, resumes: bool) -> None:
        self.path = output_dir / JOURNAL_FILE
        self._resumes = resumes
        self._saved: dict[str, Any] = {}
        self._checkpoint: Path | None = None
        self._history: History | None = None

    def load_state_dict(self, saved: Mapping[str, Any], folder: Path) -> None:
        """Take what a checkpoint says of the rows. Call it before `open`."""
        self._saved, self._checkpoint = dict(saved), folder

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, in JSON types; {} before the start."""
        if self._history is None:
            return {}
        self._history.sync()
        kept = {name: self._saved[name] for name in ("run",) if name in self._saved}
        return {"rows": self._history.rows, **kept}

    def files_of_checkpoint(self) -> dict[str, Callable[[Path], None]]:
        """Return the files that a checkpoint keeps: by name the function that writes each, in any thread."""
        return {} if self._history is None else {JOURNAL_FILE: self._history.copier()}

    def open(self) -> None:
        """Cut the journal to the rows of the checkpoint, which brings them if they are not on this disk."""
        if not self._resumes and self.path.is_file():  # of a training before, which left no checkpoint
            self.path.replace(self.path.with_name("metrics.before.jsonl"))
        if self._checkpoint is not None and not self.path.exists():
            with suppress(OSError):  # of a Trainer's checkpoint, or of a version before
                shutil.copyfile(self._checkpoint / JOURNAL_FILE, self.path)
        journal, rows = Journal(self.path), int(self._saved.get("rows", 0))
        next_step = max((line["_step"] + 1 for line, _ in journal.lines() if line["_row"] < rows), default=rows)
        # As of a run of W&B's that begins here and has all rows before: none is sent, and none is made again.
        self._history = History(journal, rows=rows, first_row=rows, first_step=next_step, have=next_step)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write the next row."""
        if self._history is not None:
            self._history.log(row)

    def close(self) -> None:
        """Sync and close the journal."""
        history, self._history = self._history, None
        if history is not None:
            history.close()
