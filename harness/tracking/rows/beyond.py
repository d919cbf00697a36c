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

    - size: the bytes to keep of it; counted_bytes: those of the rows that the checkpoint counts.
    - next_step: the step behind those rows; before: the last of them; last: the last row that W&B is taken to have.
    - num_lost: rows of the checkpoint that W&B lacks; latest: the newest value of each name.
    - unread: the steps that W&B has, where it is not known whether they are all in the journal; else 0.
    """

    next_step: int
    size: int = 0
    counted_bytes: int = 0
    before: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    num_lost: int = 0
    latest: dict[str, Any] = field(default_factory=dict)
    unread: int = 0


def survey(journal: Journal, *, rows: int, first_row: int, next_step: int, have: int | None) -> Survey:
    """Read the journal once. `rows` are those of the checkpoint, `have` the steps of W&B; None: unknown."""
    found = Survey(next_step=next_step, unread=have or 0)
    for line, end in journal.lines():
        row, step = line["_row"], line["_step"]
        is_there = have is not None and step < have
        if row >= rows and have is not None and not is_there:
            break  # made again, and new to W&B
        found.size = end
        if row < rows:
            found.counted_bytes = end
        if row < first_row:
            continue
        if row < rows:
            found.before, found.next_step = line, step + 1
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
    last, reason = found.last, ""
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
        start, step = _common(journal, source, top=min(found.next_step, have) - 1)
        theirs = _Theirs(filter(is_own, source.read(step, have)))
    except UNREADABLE as error:
        reason = f" ({type(error).__name__}: {error})"
        journal.begin(found.size)
        _tell_unread(have - max(found.next_step, last["_step"] + 1 if last is not None else 0), reason)
        return
    _align(journal, found, theirs, start=start, rows=rows, have=have)


def _common(journal: Journal, source: Source, *, top: int) -> tuple[int, int]:
    """
    Return the bytes of the journal up to a row that W&B has at the same step, and the step behind it.

    It looks at `top` first, then further and further back: where nothing is the same, at the first step.
    """
    steps = {step for exponent in range(top.bit_length() + 1) if (step := top + 1 - 2**exponent) >= 0}
    lines = {line["_step"]: (line, end) for line, end in journal.lines() if line["_step"] in steps}
    for step in sorted(lines, reverse=True):
        line, end = lines[step]
        row = next(source.read(step, step + 1), None)
        if row is not None and is_same_row(line, row):
            return end, step + 1
    return 0, 0


def _align(journal: Journal, found: Survey, theirs: _Theirs, *, start: int, rows: int, have: int) -> None:
    """Write the journal anew from byte `start` on: the checkpoint's rows where W&B has them, then what it has more."""
    ours = journal.lines(start, found.counted_bytes)
    our = next(ours, None)  # it has the file open: `begin` makes another one
    journal.begin(start)
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
        found.next_step = step + 1
        our = next(ours, None)
    found.counted_bytes = journal.size
    reached = min(found.next_step, have)
    while (row := theirs.peek()) is not None:
        if row["_step"] >= found.next_step:
            values = {name: value for name, value in row.items() if not name.startswith("_")}
            journal.append(rows, row["_step"], row.get("_timestamp", 0.0), values)
            rows += 1
        reached = row["_step"] + 1
        theirs.take()
    found.size, found.unread = journal.size, have if theirs.reason else 0
    if theirs.reason:
        _tell_unread(have - reached, theirs.reason)


class _Theirs:
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
            self._next, self.reason = None, f" ({type(error).__name__}: {error})"

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
            "%d rows that W&B has beyond the checkpoint can't be read%s: as many rows of this training are taken to be "
            "the same, and are not sent.",
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
