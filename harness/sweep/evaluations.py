"""The values of a metric in the rows of a run, read while the rows are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.tracking.rows.journal import JOURNAL_FILE, Journal

STEP = "train/global_step"


class Evaluations:
    """
    A metric by optimizer step, in the order of the evaluations; a later row of the same step replaces an earlier one.

    `names` are those of all values that rows have had, to say what there is where the metric is missing.
    """

    def __init__(self, folder: Path, metric: str) -> None:
        self._journal, self._metric = Journal(folder / JOURNAL_FILE), metric
        self._file: tuple[int, int] | None = None
        self._read = 0
        self._values: dict[int, float] = {}
        self.names: set[str] = set()
        self.last_step = 0

    def now(self) -> Mapping[int, float]:
        """Return what there is by now. An attempt writes a file of its own, which begins with the rows of before."""
        try:
            state = self._journal.path.stat()
        except OSError:
            return self._values
        if self._file is None or self._file[0] != state.st_ino or self._file[1] > state.st_size:
            self._read, self._values, self.last_step = 0, {}, 0
        if self._file != (state.st_ino, state.st_size):
            for row, end in self._journal.lines(self._read):
                self._read = end
                self._take(row)
            self._file = (state.st_ino, state.st_size)
        return self._values

    def _take(self, row: Mapping[str, Any]) -> None:
        step = row.get(STEP)
        if not isinstance(step, int):
            return
        self.last_step = max(self.last_step, step)
        self.names |= {name for name, value in row.items() if isinstance(value, int | float)}
        if isinstance(value := row.get(self._metric), int | float):
            self._values[step] = float(value)
