"""Sends each row of a run once over all attempts: rows that a resumed training makes again are not sent again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.tracking.client import next_step
from harness.tracking.rows.journal import COLUMNS, Journal, decoded, encoded

logger = logging.getLogger(__name__)

# What the clock and the machine say, which no two attempts share.
TIMING = ("runtime", "_per_second", "_seconds")
MEASURED = ("train/throughput/", "train/memory/")


class History:
    """
    Counts the rows of a run from the beginning of its training, and writes each to the journal before W&B gets it.

    - rows: how many the checkpoint has counted; the training makes those behind it again.
    - first_row, first_step: the first row of the training that is in this W&B run, and its step there.
    - have: how many steps W&B has of the run; None if that is unknown: this attempt then sends nothing.

    Rows that the user sends to the run directly take steps of W&B's too; they are not counted, and are sent again.
    """

    def __init__(self, journal: Journal, *, rows: int, first_row: int, first_step: int, have: int | None) -> None:
        self.rows, self._have, self._journal = rows, have, journal
        self._next_step = first_step + rows - first_row
        self._run: Any = None
        self._offset = 0
        self._has_diverged = False
        self._recorded: dict[int, dict[str, Any]] = {}  # in W&B, and made again by this training
        self._lost: list[dict[str, Any]] = []  # missing in W&B, and not made again: sent from the journal
        self._latest: dict[str, Any] = {}
        size = 0
        for line, end in journal.lines():
            row, step = line["_row"], line["_step"]
            is_there = have is not None and step < have
            if row >= rows and have is not None and not is_there:
                break  # made again, and new to W&B
            size = end
            if row >= rows:
                self._recorded[row] = line
            elif row >= first_row:
                self._next_step = step + 1
                if have is not None and not is_there:
                    self._lost.append(line)
            if is_there and row >= first_row:
                self._latest |= line
        journal.begin(size)
        expected = max(first_step + rows - first_row - (have or 0), 0) if have is not None else 0
        if expected > len(self._lost):
            logger.warning(
                "%d rows before the checkpoint are in neither W&B nor %s: the history has a gap there.",
                expected - len(self._lost),
                journal.path,
            )

    def begin(self, run: Any, *, offset: int) -> None:
        """Go on with the open run, whose step 0 is W&B's `offset`: send the lost rows, bring the summary up to date."""
        self._run, self._offset = run, offset
        numbers = {name: value for name, value in self._latest.items() if name not in COLUMNS and _fits_summary(value)}
        if numbers:
            run.summary.update(decoded(numbers))
        for line in self._lost:
            run.log({**decoded(line), "_timestamp": line["_timestamp"]})
        if self._lost:
            logger.info("%d rows that W&B lacked are sent again.", len(self._lost))
        self._lost = []

    def log(self, row: Mapping[str, Any]) -> None:
        """Take the next row: write it to the journal and send it, or compare it with the one that W&B has."""
        values = encoded(row)
        recorded = self._recorded.pop(self.rows, None)
        if recorded is not None and _is_same_event(recorded, values):
            self._compare(recorded, values)
            self.rows, self._next_step = self.rows + 1, recorded["_step"] + 1
            return
        if recorded is not None:
            self._leave_recorded(recorded)
        timestamp = time.time()
        is_there = self._have is not None and self._next_step < self._have  # the journal has lost it
        is_sent = self._run is not None and not is_there
        step = self._next_step
        if is_sent:
            step = self._offset + next_step(self._run, step - self._offset)
        self._journal.append(self.rows, step, timestamp, values)
        self.rows, self._next_step = self.rows + 1, step + 1
        if is_sent:
            self._run.log({**row, "_timestamp": timestamp})

    def sync(self) -> None:
        """Sync the journal to the disk, before a checkpoint counts its rows."""
        self._journal.sync()

    def copier(self) -> Callable[[Path], None]:
        """Return what copies the rows into a checkpoint, see Journal.copier: it has them if this disk is lost."""
        return self._journal.copier()

    def close(self) -> None:
        """Sync and close the journal."""
        self._journal.sync()
        self._journal.close()

    def _leave_recorded(self, recorded: Mapping[str, Any]) -> None:
        """Stop comparing, since the training makes other rows than before (other logging steps). W&B keeps the old."""
        last = self._recorded[max(self._recorded)] if self._recorded else recorded
        logger.warning(
            "The run makes other rows than before the interruption, from step %s on: the %d that W&B has stay there.",
            recorded.get("train/global_step", "?"),
            last["_row"] - recorded["_row"] + 1,
        )
        self._recorded = {}
        self.rows, self._next_step = last["_row"] + 1, last["_step"] + 1
        self._have = None if self._have is None else 0

    def _compare(self, recorded: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        if self._has_diverged:
            return
        for name, value in values.items():
            if _is_measured(name):
                continue
            before = recorded[name]
            if before == value or (_is_nan(before) and _is_nan(value)):
                continue
            self._has_diverged = True
            logger.warning(
                "The run no longer repeats itself: at step %s %s was %s before the interruption and is now %s%s. "
                "W&B keeps the first; further differences are not told.",
                values.get("train/global_step", "?"),
                name,
                _shown(before),
                _shown(value),
                _size(before, value),
            )
            return


def _is_same_event(recorded: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    step = "train/global_step"
    # On another machine, and in a journal of an older version, other things are measured.
    before, now = ({name for name in row if not name.startswith(MEASURED)} for row in (recorded, values))
    return before.difference(COLUMNS) == now and recorded.get(step) == values.get(step)


def _is_measured(name: str) -> bool:
    return name.endswith(TIMING) or name.startswith(MEASURED)


def _fits_summary(value: Any) -> bool:
    return not isinstance(value, dict) or value.get("_type") == "histogram"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _size(before: Any, now: Any) -> str:
    if not isinstance(before, int | float) or not isinstance(now, int | float):
        return ""
    return f" (a relative difference of {abs(now - before) / max(abs(before), abs(now), 1e-300):.1e})"
