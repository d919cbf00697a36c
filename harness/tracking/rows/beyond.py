"""What W&B has of a training that is resumed: in the journal, or, where another folder has sent it, read back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.tracking.rows.events import STEP, is_end, is_own, is_same_row
from harness.tracking.rows.journal import COLUMNS, Journal

logger = logging.getLogger(__name__)

# What reading rows back raises: the network, the disk, or what is no answer.
UNREADABLE = (OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, kw_only=True)
class Source:
    """
    Where rows that have been sent can be read: `read` yields those from one step to before another, by their `_step`.

    `is_shared`: other folders may have sent rows there, so that ours may be others than the journal's.
    """

    read: Callable[[int, int], Iterator[dict[str, Any]]]
    is_shared: bool


@dataclass(kw_only=True)
class Survey:
    """
    A journal as a resume finds it.

    - size: the bytes to keep of it; counted_bytes: those of the checkpoint's rows; earlier_bytes: those of rows before
      the run's first one, which has the step first_step.
    - next_step: the step behind the checkpoint's rows; last: the last row that W&B is taken to have.
    - num_lost: rows of the checkpoint that W&B lacks; latest: the newest value of each name.
    - unread: the steps that W&B has, where it is not known whether they are all in the journal; else 0.
    """

    first_step: int
    next_step: int
    size: int = 0
    counted_bytes: int = 0
    earlier_bytes: int = 0
    last: dict[str, Any] | None = None
    num_lost: int = 0
    latest: dict[str, Any] = field(default_factory=dict)
    unread: int = 0


def survey(journal: Journal, *, rows: int, first_row: int, first_step: int, have: int | None) -> Survey:
    """Read the journal once. `rows` are those of the checkpoint, `have` the steps of W&B; None: unknown."""
    found = Survey(first_step=first_step, next_step=first_step + rows - first_row, unread=have or 0)
    for line, end in journal.lines():
        row, step = line["_row"], line["_step"]
        is_there = have is not None and step < have
        if row >= rows and have is not None and not is_there:
            break  # made again, and new to W&B
        found.size = end
        if row < rows:
            found.counted_bytes = end
        if row < first_row:
            found.earlier_bytes = end
            continue
        if row < rows:
            found.next_step = step + rows - row
            found.num_lost += have is not None and not is_there
        if is_there:
            found.last = line
            found.latest |= line
    return found


def begin_journal(journal: Journal, found: Survey, source: Source | None, *, rows: int, have: int | None) -> None:
    """
    Begin the journal of this attempt with all rows that W&B has; `found` is then what it holds.

    Rows of the checkpoint that W&B lacks, since the end of an earlier training is at their step there, get other steps.
    Rows that differ from the journal's, and rows that can't be read, are told.
    """
    last = found.last
    is_known = last is not None and last["_step"] + 1 == have
    if source is None or not have or (is_known and not source.is_shared):
        journal.begin(found.size)
        found.unread = 0 if is_known else found.unread
        return
    try:
        newest = next(source.read(have - 1, have), None)
        if is_known and last is not None and (newest is None or is_same_row(last, newest)):
            journal.begin(found.size)
            found.unread = 0
            return
        place = _common(journal, found, source, rows=rows, have=have)
        theirs = Theirs(filter(is_own, source.read(place.step, have)))
    except UNREADABLE as error:
        journal.begin(found.size)
        reached = max(found.next_step, last["_step"] + 1 if last is not None else 0)
        _tell_unread(have - reached, f"{type(error).__name__}: {error}")
        return
    _align(journal, found, theirs, place, rows=rows, have=have)


@dataclass(frozen=True)
class Place:
    """A place in the journal: behind so many bytes, before this row and this step."""

    size: int
    row: int
    step: int


def _common(journal: Journal, found: Survey, source: Source, *, rows: int, have: int) -> Place:
    """
    Return the place behind a row that W&B has at the same step.

    It looks at the newest that both may have, then further and further back: where none is the same, at the beginning.
    """
    top = min(found.next_step, have)
    steps = {step for exponent in range(top.bit_length() + 1) if (step := top - 2**exponent) >= found.first_step}
    lines = journal.lines(found.earlier_bytes, found.counted_bytes)
    for line, end in reversed([(line, end) for line, end in lines if line["_step"] in steps]):
        row = next(source.read(line["_step"], line["_step"] + 1), None)
        if row is not None and is_same_row(line, row):
            return Place(end, line["_row"] + 1, line["_step"] + 1)
    if found.counted_bytes == found.earlier_bytes:  # a checkpoint of a version before, say: it has no copy of the rows
        return Place(found.earlier_bytes, rows, found.next_step)
    return Place(found.earlier_bytes, 0, found.first_step)


def _align(journal: Journal, found: Survey, theirs: Theirs, place: Place, *, rows: int, have: int) -> None:
    """Write the journal anew from a place on: the checkpoint's rows where W&B has them, then what it has more."""
    ours = journal.lines(place.size, found.counted_bytes)
    our = next(ours, None)  # it has the file open: `begin` makes another one
    journal.begin(place.size)
    number, next_step = place.row, place.step
    found.num_lost, is_other = 0, False
    while our is not None:
        line, row, step = our[0], theirs.behind_ends(our[0]), our[0]["_step"]
        if is_other or theirs.reason:
            pass  # by their numbers
        elif row is None:
            step = have + found.num_lost
        elif is_same_row(line, row):
            step = row["_step"]
            theirs.take()
        else:
            is_other = True
            _tell_other(line, row, journal)
        values = {name: value for name, value in line.items() if name not in COLUMNS}
        journal.append(line["_row"], step, line["_timestamp"], values)
        found.num_lost += step >= have
        number, next_step = line["_row"] + 1, step + 1
        our = next(ours, None)
    found.counted_bytes, found.next_step = journal.size, next_step
    while (row := theirs.peek()) is not None:
        if row["_step"] >= next_step:
            values = {name: value for name, value in row.items() if not name.startswith("_")}
            journal.append(number, row["_step"], row.get("_timestamp", 0.0), values)
            number, next_step = number + 1, row["_step"] + 1
            if number <= rows:  # the journal has lost it
                found.counted_bytes, found.next_step = journal.size, next_step
        theirs.take()
    found.size, found.unread = journal.size, have if theirs.reason else 0
    if theirs.reason:
        _tell_unread(have - next_step, theirs.reason)


class Theirs:
    """The rows of the training that W&B has, read as they are looked at; `reason` says why no more can be read."""

    def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
        self.reason = ""
        self._rows, self._next, self._end = rows, next(rows, None), None

    def peek(self) -> dict[str, Any] | None:
        """Return the next row without taking it; None if there is none."""
        return self._next

    def take(self) -> None:
        """Go on to the row behind the next one."""
        try:
            self._next = next(self._rows, None)
        except UNREADABLE as error:
            self._next, self.reason = None, f"{type(error).__name__}: {error}"

    def behind_ends(self, line: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the next row that is ours or not of the end of a training."""
        while (row := self._next) is not None and not is_same_row(line, row):
            self._end = row.get(STEP) if is_end(row) else self._end
            if self._end is None or row.get(STEP) != self._end:
                break
            self.take()
        return self._next


def _tell_other(line: Mapping[str, Any], row: Mapping[str, Any], journal: Journal) -> None:
    logger.warning(
        "W&B has another row %d than this training: of step %s, not of step %s as %s has it. The run went on "
        "elsewhere; what W&B has stays there.",
        row["_step"],
        row.get(STEP, "?"),
        line.get(STEP, "?"),
        journal.path,
    )


def _tell_unread(count: int, reason: str) -> None:
    if count > 0:
        logger.warning(
            "%d rows that W&B has beyond the checkpoint can't be read (%s): as many rows of this training are taken to "
            "be the same, and are not sent.",
            count,
            reason,
        )


class Ahead:
    """The rows of a part of the journal, read one by one as the training comes to them: they may be very many."""

    def __init__(self, journal: Journal, *, start: int, stop: int, first_row: int) -> None:
        self._lines = (line for line, _ in journal.lines(start, stop) if line["_row"] >= first_row)
        self._next: Mapping[str, Any] | None = None
        self._is_read = False

    def peek(self) -> Mapping[str, Any] | None:
        """Return the next row without taking it; None if there is none."""
        if not self._is_read:
            self._next, self._is_read = next(self._lines, None), True
        return self._next

    def take(self) -> None:
        """Go on to the row behind the next one."""
        self._is_read = False

    def last(self) -> Mapping[str, Any] | None:
        """Take all rows; returns the last of them, None if there is none left."""
        last = None
        while (line := self.peek()) is not None:
            last = line
            self.take()
        return last

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
