"""Sends each row of a run once over all attempts: rows that a resumed training makes again are not sent again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.tracking.client import next_step
from harness.tracking.rows.beyond import Ahead, Source, begin_journal, survey
from harness.tracking.rows.events import STEP, difference, is_end, is_later, is_same_event
from harness.tracking.rows.journal import COLUMNS, Journal, decoded, encoded

logger = logging.getLogger(__name__)


class History:
    """
    Counts the rows of a run from the beginning of its training, and writes each to the journal before W&B gets it.

    - rows: how many the checkpoint has counted; the training makes those behind it again.
    - first_row, first_step: the first row of the training that is in this W&B run, and its step there.
    - have: how many steps W&B has of the run; None if that is unknown: this attempt then sends nothing.
    - source: where those can be read that the journal lacks; None: they are taken to be those that are made again.

    What a training has sent at its end stays where it is when it goes on, since W&B takes no row back: it is passed
    over. Rows that the user sends to the run directly take steps of W&B's too; they are not counted, and are sent
    again.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        rows: int,
        first_row: int,
        first_step: int,
        have: int | None,
        source: Source | None = None,
    ) -> None:
        self.rows, self._have, self._journal = rows, have, journal
        self._run: Any = None
        self._offset = 0
        self._has_diverged = False
        self._end_step: Any = None
        expected = first_step + rows - first_row
        found = survey(journal, rows=rows, first_row=first_row, first_step=first_step, have=have)
        if have is not None and max(expected - have, 0) > found.num_lost:
            logger.warning(
                "%d rows before the checkpoint are in neither W&B nor %s: the history has a gap there.",
                expected - have - found.num_lost,
                journal.path,
            )
        begin_journal(journal, found, source, rows=rows, have=have)
        self._next_step, self._unread, self._latest = found.next_step, found.unread, found.latest
        self._lost = (found.num_lost, found.counted_bytes, first_row)  # sent from the journal: nobody makes them again
        # In W&B, and made again by this training.
        self._recorded = Ahead(journal, start=found.counted_bytes, stop=found.size, first_row=rows)

    def begin(self, run: Any, *, offset: int) -> None:
        """Go on with the open run, whose step 0 is W&B's `offset`: send the lost rows, bring the summary up to date."""
        self._run, self._offset = run, offset
        numbers = {name: value for name, value in self._latest.items() if name not in COLUMNS and _fits_summary(value)}
        if numbers:
            run.summary.update(decoded(numbers))
        self._latest = {}
        num_lost, stop, first_row = self._lost
        if num_lost:
            for line, _ in self._journal.lines(0, stop):
                if first_row <= line["_row"] < self.rows and line["_step"] >= (self._have or 0):
                    run.log({**decoded(line), "_timestamp": line["_timestamp"]})
            logger.info("%d rows that W&B lacked are sent again.", num_lost)

    def log(self, row: Mapping[str, Any]) -> None:
        """Take the next row: write it to the journal and send it, or compare it with the one that W&B has."""
        values = encoded(row)
        if (recorded := self._find(values)) is not None:
            self._compare(recorded, values)
            return
        timestamp = time.time()
        ahead = self._recorded.peek()
        is_damaged = ahead is not None and ahead["_row"] > self.rows  # its line in the journal
        is_there = is_damaged or self._next_step < self._unread
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
        self._recorded.close()
        self._journal.sync()
        self._journal.close()

    def _find(self, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the row of the same event that W&B has, and count it; None if W&B lacks it."""
        other = None
        while (line := self._recorded.peek()) is not None and line["_row"] <= self.rows and not is_later(line, values):
            self._recorded.take()
            if line["_row"] < self.rows:  # a damaged line's row, which was written again
                continue
            self.rows, self._next_step = line["_row"] + 1, line["_step"] + 1
            if is_end(line):
                self._end_step = line.get(STEP)
            if is_same_event(line, values):
                return line
            if self._end_step is None or line.get(STEP) != self._end_step:
                other = other or line
        if other is None and line is not None and line["_row"] <= self.rows:
            other = line
        if other is not None:
            self._leave_recorded(other)
        return None

    def _leave_recorded(self, first: Mapping[str, Any]) -> None:
        """Stop comparing, since the training makes other rows than before (other logging steps). W&B keeps the old."""
        if (last := self._recorded.last()) is not None:
            self.rows, self._next_step = last["_row"] + 1, last["_step"] + 1
        logger.warning(
            "The run makes other rows than before the interruption, from step %s on: the %d that W&B has stay there.",
            first.get(STEP, "?"),
            self.rows - first["_row"],
        )
        self._unread = 0

    def _compare(self, recorded: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        if self._has_diverged or (found := difference(recorded, values)) is None:
            return
        self._has_diverged = True
        name, before, value = found
        logger.warning(
            "The run no longer repeats itself: at step %s %s was %s before the interruption and is now %s%s. "
            "W&B keeps the first; further differences are not told.",
            values.get(STEP, "?"),
            name,
            _shown(before),
            _shown(value),
            _size(before, value),
        )


def _fits_summary(value: Any) -> bool:
    return not isinstance(value, dict) or value.get("_type") == "histogram"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _size(before: Any, now: Any) -> str:
    if not isinstance(before, int | float) or not isinstance(now, int | float):
        return ""
    return f" (a relative difference of {abs(now - before) / max(abs(before), abs(now), 1e-300):.1e})"
