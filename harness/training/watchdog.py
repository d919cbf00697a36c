"""Warn once when a step takes far longer than usual, with the rank that is late and where it is. It ends nothing."""

from __future__ import annotations

import json
import logging
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch.distributed.distributed_c10d import PrefixStore

from harness.training.flags import WatchdogConfig
from harness.training.state import TrainState

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

# The places of the loop, as a warning names them.
START, DATA, STEP, REPORT, EVALUATION = "the start", "data", "forward and backward", "report", "evaluation"
SAVE, END = "save", "the end"
TIMES_THE_USUAL = 10
KEPT_DURATIONS = 20
SHORTEST_INTERVAL, LONGEST_INTERVAL = 0.5, 5.0  # seconds
# A rank whose thread has posted nothing between the first and the last of so many looks counts as silent.
LOOKS = 4
NEAR_TIMEOUT = 0.8
STORE_TIMEOUT = timedelta(seconds=10)
SHOWN_RANKS = 4


@dataclass(kw_only=True)
class Position:
    """
    The place of this rank in the loop since `began_at` (monotonic clock).

    `count` grows by one a place, alike on all ranks.
    """

    phase: str
    step: int
    count: int
    began_at: float
    ended_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Post:
    """The last message of a rank's thread; `beat` counts its messages."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    count: int
    seconds: float
    beat: int

    @property
    def place(self) -> str:
        """The rank's place in the loop, in words."""
        return f"{self.phase} (step {self.step})"

    @property
    def name(self) -> str:
        """The rank's process, in words."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


class Watchdog:
    """
    Watches the pace of the loop from a thread of its own on each rank.

    - ranks: the index of this rank, and the number of ranks.
    - timeout_seconds: when a hanging collective raises; shortly before, even the first step of its kind is called slow.

    The loop notes where it is. The thread posts that to the other ranks through the process group's store, never by a
    collective. Rank zero writes the warning for all; if it is silent itself, the first rank that isn't does.
    """

    def __init__(self, config: WatchdogConfig, *, ranks: tuple[int, int], timeout_seconds: float) -> None:
        self.rank, self.num_ranks = ranks
        self.slow_seconds = config.slow_step_seconds
        self.near_timeout = NEAR_TIMEOUT * timeout_seconds if self.num_ranks > 1 else float("inf")
        self.interval = max(SHORTEST_INTERVAL, min(LONGEST_INTERVAL, self.slow_seconds / 6, self.near_timeout / 24))
        self._position = Position(phase=START, step=0, count=0, began_at=time.monotonic())
        # Tuples, replaced as a whole, since the thread may read them at any time.
        self._durations: dict[str, tuple[float, ...]] = {}
        self._ended = threading.Event()
        self._store: PrefixStore | None = None
        self._beat = self._num_looks = 0
        self._first_look: tuple[int, dict[int, Post]] = (0, {})
        self._reported: Position | None = None

    def at(self, phase: str, step: int) -> None:
        """Record that the loop is now in this phase of this step. Takes microseconds."""
        before, now = self._position, time.monotonic()
        before.ended_at = now
        kept = self._durations.get(before.phase, ())[1 - KEPT_DURATIONS :]
        self._durations[before.phase] = (*kept, now - before.began_at)
        self._position = Position(phase=phase, step=step, count=before.count + 1, began_at=now)

    def drawn(self, items: Iterator[Item], state: TrainState) -> Iterator[Item]:
        """Yield the same items; drawing one counts as the phase of data, working on it as forward and backward."""
        while True:
            self.at(DATA, state.global_step + 1)
            try:
                item = next(items)
            except StopIteration:
                return
            self.at(STEP, state.global_step + 1)
            yield item

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch during the block; the thread ends with it."""
        if self.slow_seconds == 0:
            yield
            return
        self._store = _own_store() if self.num_ranks > 1 else None
        self._position.began_at = time.monotonic()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(STORE_TIMEOUT.total_seconds())  # with a limit, as a store on a dead node may never answer
            self._store = None

    # The thread

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            position = self._position
            post = self._speak(position)
            if self._reported is None:
                self._judge(position, post)
            self._tell_end()
        self._tell_end()

    def _speak(self, position: Position) -> Post:
        self._beat += 1
        post = Post(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            phase=position.phase,
            step=position.step,
            count=position.count,
            seconds=time.monotonic() - position.began_at,
            beat=self._beat,
        )
        if self._store is not None:
            try:
                self._store.set(str(self.rank), json.dumps(asdict(post)))
            except RuntimeError as error:
                self._lose_store(error)
        return post

    def _judge(self, position: Position, own: Post) -> None:
        """Compare with the other ranks once this rank is overdue; after some looks, warn if it is this rank's turn."""
        durations = self._durations.get(position.phase, ())
        if own.seconds <= limit(durations, slow_seconds=self.slow_seconds, near_timeout=self.near_timeout):
            self._num_looks = 0
            return
        # Some calls of torch's store have no timeout: they hang if rank zero, which holds the store, is stopped.
        alarm = threading.Timer(STORE_TIMEOUT.total_seconds(), self._warn, (position, own, {self.rank: own}, set()))
        alarm.daemon = True
        alarm.start()
        try:
            posts = self._listen() | {self.rank: own}
        finally:
            alarm.cancel()
        if self._reported is not None:
            return
        if self._num_looks == 0 or self._first_look[0] != position.count:
            self._num_looks, self._first_look = 0, (position.count, posts)
        self._num_looks += 1
        if self._num_looks < LOOKS:
            return
        self._num_looks = 0  # look again: if it isn't our turn now, rank zero may fall silent later
        before = self._first_look[1]
        hears_all = self.num_ranks == 1 or self._store is not None
        silent = (
            {r for r in range(self.num_ranks) if r not in posts or posts[r] == before.get(r)} if hears_all else set()
        )
        if not hears_all or all(rank in silent for rank in range(self.rank)):
            self._warn(position, own, posts, silent)

    def _warn(self, position: Position, own: Post, posts: Mapping[int, Post], silent: set[int]) -> None:
        self._reported = position
        durations = self._durations.get(position.phase, ())
        usual = f" Usually {position.phase} takes {statistics.median(durations):.2g} s." if durations else ""
        finding = describe(posts, silent, num_ranks=self.num_ranks, step=own.step)
        logger.warning("%s%s %s", finding, usual, advice(posts, silent, self._backend()))

    def _tell_end(self) -> None:
        reported = self._reported
        if reported is not None and reported.ended_at is not None:
            seconds = reported.ended_at - reported.began_at
            logger.warning("Step %d goes on after %.1f s in %s.", reported.step, seconds, reported.phase)
            self._reported = None

    def _listen(self) -> dict[int, Post]:
        found: dict[int, Post] = {}
        try:
            for rank in range(self.num_ranks):
                # `get` would wait for a value that isn't there.
                if self._store is not None and self._store.check([str(rank)]):
                    found[rank] = Post(**json.loads(self._store.get(str(rank))))
        except RuntimeError as error:
            self._lose_store(error)
        return found

    def _lose_store(self, error: RuntimeError) -> None:
        # Not asked again: a late answer to this call would be taken for the answer to the next one.
        self._store = None
        logger.debug("The watchdog no longer hears of other ranks: %s", error)

    def _backend(self) -> str:
        return str(torch.distributed.get_backend()) if self.num_ranks > 1 else ""


def _own_store() -> PrefixStore | None:
    # Torch has no public way to the group's store. A clone has a connection of its own: the one of the group is
    # locked while the main thread waits on it.
    groups = torch.distributed.distributed_c10d._get_default_store()
    if groups is None or not hasattr(groups, "clone"):  # mpi's group has none, an old torch does not clone it
        return None
    store = groups.clone()
    store.set_timeout(STORE_TIMEOUT)
    return PrefixStore("harness/watchdog", store)


def limit(durations: Sequence[float], *, slow_seconds: float, near_timeout: float) -> float:
    """
    Return the seconds after which a phase is overdue, from its last durations.

    Without any there is nothing to compare with: then only the process group's timeout, when it is near, counts.
    """
    if not durations:
        return near_timeout
    usual = statistics.median(durations)
    return max(min(slow_seconds, near_timeout), min(TIMES_THE_USUAL * usual, max(2 * usual, near_timeout)))


def late_ranks(posts: Mapping[int, Post], silent: set[int]) -> list[int]:
    """
    Return the ranks that the others wait for: the silent ones, else those furthest behind.

    All, if none is behind.
    """
    if silent:
        return sorted(silent)
    furthest_behind = min(post.count for post in posts.values())
    return [rank for rank, post in sorted(posts.items()) if post.count == furthest_behind]


def describe(posts: Mapping[int, Post], silent: set[int], *, num_ranks: int, step: int) -> str:
    """Return who is late and where, and where the others wait; `step` is the step of the rank that warns."""
    late = late_ranks(posts, silent)
    parts = []
    for rank in late[:SHOWN_RANKS]:
        post = posts.get(rank)
        if post is None:
            parts.append(f"rank {rank} has never been heard of")
        elif rank in silent:
            parts.append(
                f"{post.name} is silent, last heard of in {post.place}: stopped, swapped out, its node gone, "
                "or in a call that keeps Python's lock"
            )
        else:
            parts.append(f"{post.name} has been in {post.place} for {post.seconds:.1f} s")
    if len(late) > SHOWN_RANKS:
        parts.append(f"and {len(late) - SHOWN_RANKS} more ranks")
    if not silent and len(posts) < num_ranks:
        parts.append("the other ranks can't be asked: the launcher, or rank zero, does not answer")
    elif not silent and len(late) == num_ranks > 1:
        parts.append("all ranks are there: one still computes, or they do not wait for the same")
    waiting: dict[str, list[int]] = {}
    for rank in sorted(posts.keys() - set(late)):
        waiting.setdefault(posts[rank].place, []).append(rank)
    parts += [f"{_ranks(ranks)} in {place}" for place, ranks in waiting.items()]
    return f"Step {step} is slow: {'; '.join(parts)}."


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} waits"
    shown = ", ".join(str(rank) for rank in ranks[:SHOWN_RANKS])
    more = f" and {len(ranks) - SHOWN_RANKS} more" if len(ranks) > SHOWN_RANKS else ""
    return f"ranks {shown}{more} wait"


def advice(posts: Mapping[int, Post], silent: set[int], backend: str) -> str:
    """Return how to find out more; `backend` is the process group's, "" without one."""
    late = [posts[rank] for rank in late_ranks(posts, silent) if rank in posts]
    # A rank that draws a batch may wait for its data workers.
    pid = f"{'--subprocesses ' if late[0].phase == DATA else ''}--pid {late[0].pid}" if late else ""
    first = f"See what it does: py-spy dump {pid} on {late[0].host}." if late else ""
    if backend == "nccl":
        # On by default since torch 2.9 or so; the older names, TORCH_NCCL_TRACE_BUFFER_SIZE and
        # TORCH_NCCL_DEBUG_INFO_TEMP_FILE, still work.
        first += (
            " When --ddp_timeout strikes, torch writes the last collectives of each rank to the prefix in "
            "TORCH_FR_DUMP_TEMP_FILE (unless TORCH_FR_BUFFER_SIZE or TORCH_NCCL_DUMP_ON_TIMEOUT is 0); torchfrtrace "
            "reads them."
        )
    elif backend == "gloo":
        first += " If ranks do not wait for the same, TORCH_DISTRIBUTED_DEBUG=DETAIL names the collective (slow)."
    return first.strip()
