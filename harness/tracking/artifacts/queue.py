"""The upload queue: a thread that sends staged artifacts to W&B, one after the other, beside the training."""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.errors import StagingError
from harness.tracking.artifacts.staging import Staged, complete, discard, waiting, write_record
from harness.tracking.artifacts.upload import (
    build,
    delete_superseded,
    deliver,
    is_checkpoint,
    link_command,
    registry_path,
)
from harness.tracking.client import bytes_sent, is_run_gone, one_line, server_answers
from harness.tracking.run.identity import home_of

logger = logging.getLogger(__name__)

# An upload that fails is tried again after these pauses, before those behind it; then it is set aside, they go on.
RETRY_SECONDS = (2.0, 10.0)
ASIDE_SECONDS = 300.0
LINK_TRIES = 3
BACKLOG = 3
PROBE_SECONDS = 2.0
# An upload hangs if no byte moves for so many times as long as a silent server is waited for.
STALLED = 10
NAMES_IN_A_LINE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pending:
    """An artifact that W&B doesn't have, or has not linked, and why."""

    name: str
    aliases: list[str]
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class UploadResult:
    """
    What became of the artifacts: committed (`name:v0`), still pending, staged for `wandb sync` by an offline run.

    `linked` are the registered models that lead to one of them. `command` delivers what is left; None if nothing is, or
    if no command can.
    """

    committed: list[str] = dataclasses.field(default_factory=list)
    pending: list[Pending] = dataclasses.field(default_factory=list)
    staged: list[str] = dataclasses.field(default_factory=list)
    linked: list[str] = dataclasses.field(default_factory=list)
    command: str | None = None

    def describe(self) -> str:
        """All of it in a line."""
        parts = []
        if self.committed or not (self.pending or self.staged):
            named = f": {_listed(self.committed)}" if self.committed else ""
            parts.append(f"{_count(self.committed)} confirmed by the server{named}")
        if self.linked:
            parts.append(f"linked in the registry: {_listed(self.linked)}")
        if self.staged:
            parts.append(f"{_count(self.staged)} staged: {_listed(self.staged)}")
        if self.pending:
            reasons = [f"{pending.name} ({pending.aliases[-1]}): {pending.reason}" for pending in self.pending]
            parts.append(f"{_count(self.pending)} not delivered: {_listed(reasons)}")
        if self.command is not None:
            parts.append(f"deliver: {self.command}")
        return "; ".join(parts)


@dataclasses.dataclass(eq=False)
class _Upload:
    staged: Staged
    is_late: bool = False  # newer versions may be there already
    tries: int = 0
    last_try: float = math.inf  # its number, once the run closes
    due_at: float = 0.0
    reason: str = ""
    artifact: Any = None  # offline: built, to be recorded at the end


class Uploads:
    """
    The queue of staged artifacts that W&B lacks, and the thread that uploads them in the order of `add`.

    A failed upload is tried again in its place, twice. Then it is set aside: those behind it go on, it is tried
    again every five minutes, and the aliases that newer ones have got by then stay theirs. When the run closes,
    each is tried once more at least.

    An offline run records its artifacts at the end, since a record whose files are gone leaves an empty artifact on
    the server. Until then a checkpoint that is neither the newest nor the best is dropped when it alone holds disk.
    """

    def __init__(self, run: Any, *, keep_checkpoints: int | None, finish_timeout: float) -> None:
        self._run, self._is_offline = run, bool(run.offline)
        self._keep_checkpoints, self._finish_timeout = keep_checkpoints, finish_timeout
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closing = self._is_stopped = self._has_backlog = False
        self._waiting: list[_Upload] = []
        self._committed: list[str] = []
        self._recorded: list[Staged] = []
        self._failed: list[Pending] = []  # no command can deliver these
        self._link_commands: list[str] = []
        self._unlinked: list[Pending] = []
        self._linked: list[str] = []
        self._lost = ""
        self._cached_api: Any = None

    def add(self, staged: Iterable[Staged], *, may_be_late: bool = False) -> None:
        """Queue staged artifacts. `may_be_late`: W&B may have newer versions, which keep their aliases."""
        with self._changed:
            self._waiting += [_Upload(each, is_late=may_be_late) for each in staged]
            if self._thread is None and self._waiting and not self._is_stopped:
                self._thread = threading.Thread(target=self._work, name="wandb-artifacts", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            behind = [] if self._is_offline else list(self._waiting)
        if len(behind) >= BACKLOG and not self._has_backlog:
            pinned = sum(upload.staged.pinned_bytes() for upload in behind)
            disk = f"; {pinned / 1e6:.1f} MB are on the disk only for them" if pinned else ""
            logger.warning("Uploads to W&B are slower than saves: %d artifacts wait%s.", len(behind), disk)
        self._has_backlog = len(behind) >= BACKLOG

    def add_failed(self, pending: Pending) -> None:
        """Note an artifact that could not even be staged, for the report."""
        self._failed.append(pending)

    def close(self, limit: float | None = None) -> UploadResult:
        """
        Wait for the uploads, stop the thread, and say what was delivered. Never raises.

        It waits for at most `limit` seconds; None: while the server answers and bytes move.
        """
        try:
            reason = self._wait(math.inf if limit is None else limit)
        except KeyboardInterrupt:
            reason = "interrupted"
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            return self._result(reason)

    # The caller's thread

    def _wait(self, limit: float) -> str:
        """Wait for the thread; returns "", or why the waiting has ended before it."""
        with self._changed:
            self._is_closing = True
            for upload in self._waiting:
                upload.due_at, upload.last_try = 0.0, max(upload.tries, len(RETRY_SECONDS)) + 1
            self._changed.notify_all()
        if self._thread is None:
            return ""
        began = answered_at = moved_at = time.monotonic()
        progress: Any = None
        self._thread.join(min(PROBE_SECONDS, limit))
        while self._thread.is_alive():
            for since, patience, what in (
                (began, limit, "not confirmed"),
                (answered_at, self._finish_timeout, "the server did not answer"),
                (moved_at, STALLED * self._finish_timeout, "the upload did not move"),
            ):
                if time.monotonic() - since >= patience:
                    return f"{what} for {patience:g} s"
            probe = min(PROBE_SECONDS, max(0.1, limit - (time.monotonic() - began)))
            if self._is_offline or server_answers(self._run.settings.base_url, timeout=probe):
                answered_at = time.monotonic()
            if (now := (len(self._committed), bytes_sent(self._run, probe))) != progress or self._is_offline:
                progress, moved_at = now, time.monotonic()
            self._thread.join(probe)
        return ""

    def _result(self, reason: str) -> UploadResult:
        reason = self._lost or reason or "not uploaded"
        pending = [
            Pending(name=each.staged.name, aliases=each.staged.aliases, reason=each.reason or reason)
            for each in self._waiting
        ]
        folders = [home_of(Path(self._run.settings.sync_dir))] if self._recorded else []
        left = [*self._recorded, *(each.staged for each in self._waiting)]
        folders += [staged.folder.parent.parent for staged in left]
        commands = [f"harness sync {shlex.join(map(str, dict.fromkeys(folders)))}"] if folders else []
        return UploadResult(
            committed=list(self._committed),
            pending=[*pending, *self._failed, *self._unlinked],
            staged=[staged.name for staged in self._recorded],
            linked=list(self._linked),
            command=" && ".join([*commands, *self._link_commands]) or None,
        )

    # The thread

    def _work(self) -> None:
        while (upload := self._next()) is not None:
            upload.tries += 1
            try:
                if self._is_offline:
                    self._prepare(upload)
                else:
                    self._deliver(upload)
            except Exception as error:  # wandb and its transports raise many types, and none may end the thread
                self._note(upload, error)
        if self._is_offline and not self._is_stopped:
            self._record()

    def _next(self) -> _Upload | None:
        """The upload to try now, in order; waits for one. None when the run closes and nothing is left to try."""
        with self._changed:
            while not self._is_stopped:
                pause = math.inf
                for upload in self._waiting:
                    if upload.artifact is not None:
                        continue
                    wait = upload.due_at - time.monotonic()
                    if wait <= 0:
                        return upload
                    pause = min(pause, wait)
                    if upload.tries <= len(RETRY_SECONDS):
                        break  # those behind it keep their place
                if self._is_closing and pause == math.inf:
                    return None
                self._changed.wait(None if pause == math.inf else pause)
        return None

    def _note(self, upload: _Upload, error: Exception) -> None:
        """Decide what a failed try leads to."""
        staged, reason = upload.staged, one_line(error)
        with self._changed:
            if self._is_stopped:  # closed meanwhile: the report has said it
                return
            if self._is_offline and not staged.is_waiting:  # `harness sync` has uploaded it
                self._waiting.remove(upload)
                return
            upload.reason = reason
            upload.is_late |= upload.tries > len(RETRY_SECONDS)
            if isinstance(error, StagingError):
                self._waiting.remove(upload)
                reason = f"{reason}; delete {staged.folder} to give it up"
                self._failed.append(Pending(name=staged.name, aliases=staged.aliases, reason=reason))
            elif is_run_gone(error):
                self._lost, self._is_stopped = f"wandb's process or run has ended ({reason})", True
            elif upload.tries >= upload.last_try:
                upload.due_at = math.inf
            else:
                later = RETRY_SECONDS[upload.tries - 1] if upload.tries <= len(RETRY_SECONDS) else ASIDE_SECONDS
                upload.due_at = time.monotonic() + later
        if self._lost:
            logger.warning("W&B gets no more artifacts of this run, they stay in %s: %s.", staged.folder.parent, reason)
        elif upload.tries == len(RETRY_SECONDS) + 1 or isinstance(error, StagingError):
            logger.warning("%s (%s) could not be uploaded to W&B: %s.", staged.name, staged.aliases[-1], reason)

    def _deliver(self, upload: _Upload) -> None:
        staged = upload.staged
        committed = None
        try:
            if staged.is_waiting:
                committed = deliver(staged, api=self._api, log=self._log, may_be_late=upload.is_late)
                discard(staged)
        except StagingError:
            if staged.is_waiting:
                raise
            # Else `harness sync`, or an earlier attempt's last thread, has delivered it.
        with self._changed:
            self._waiting.remove(upload)
            if committed is not None:
                self._committed.append(committed.name)
        if committed is not None and staged.registry is not None:
            self._link(committed, staged, staged.registry)
        if committed is not None and self._keep_checkpoints is not None and is_checkpoint(staged):
            try:
                delete_superseded(self._api(), staged, self._keep_checkpoints)
            except Exception as error:  # as in `_work`; the next one tries again
                logger.warning("Older versions of %s could not be deleted in W&B: %s", staged.name, one_line(error))

    def _log(self, artifact: Any, aliases: list[str]) -> Any:
        # Without a time limit: when one is over wandb gives the answer up for good. `close` limits the waiting.
        return self._run.log_artifact(artifact, aliases=aliases).wait()

    def _api(self) -> Any:
        if self._cached_api is None:
            import wandb

            settings = self._run.settings
            self._cached_api = wandb.Api({"base_url": settings.base_url}, api_key=settings.api_key)
        return self._cached_api

    def _link(self, committed: Any, staged: Staged, registry: str) -> None:
        for number in range(LINK_TRIES):
            try:
                committed.link(registry_path(registry), staged.aliases)
            except Exception as error:  # as in `_work`
                reason = one_line(error)
                time.sleep(RETRY_SECONDS[min(number, len(RETRY_SECONDS) - 1)] if number + 1 < LINK_TRIES else 0)
            else:
                self._linked.append(f"{registry_path(registry)} ({committed.name})")
                return
        logger.warning("%s is not linked to %s: %s", committed.name, registry, reason)
        what = f"not linked to {registry}: {reason}"
        self._unlinked.append(Pending(name=committed.name, aliases=staged.aliases, reason=what))
        name = f"{staged.entity}/{staged.project}/{committed.name}"
        self._link_commands.append(link_command(name, registry, staged.aliases))

    # Offline

    def _prepare(self, upload: _Upload) -> None:
        """Build the artifact now: reading it takes as long as the disk does, and the end should not wait for that."""
        self._drop_superseded(upload.staged.folder.parent)
        if upload in self._waiting:
            upload.artifact = build(upload.staged)

    def _drop_superseded(self, root: Path) -> None:
        of_run = [each for each in waiting(root) if each.run_id == self._run.id and is_checkpoint(each)]
        best = [each for each in of_run if "best" in each.aliases]
        kept = {each.folder for each in (*of_run[-1:], *best[-1:])}
        gone = {each.folder for each in of_run if each.folder not in kept and each.pinned_bytes() > 0}
        for staged in of_run:
            if staged.folder in gone:
                discard(staged)
        with self._changed:
            self._waiting = [upload for upload in self._waiting if upload.staged.folder not in gone]

    def _record(self) -> None:
        for root in {upload.staged.folder.parent for upload in self._waiting}:
            self._drop_superseded(root)
        for upload in [upload for upload in self._waiting if upload.artifact is not None]:
            if self._is_stopped:
                return
            try:
                complete(upload.staged)
                self._run.log_artifact(upload.artifact, aliases=upload.staged.aliases)
                write_record(dataclasses.replace(upload.staged, sync_dir=str(self._run.settings.sync_dir)))
            except Exception as error:  # as in `_work`
                upload.reason = one_line(error)
                if not upload.staged.is_waiting:  # `harness sync` has uploaded it
                    with self._changed:
                        self._waiting.remove(upload)
                continue
            with self._changed:
                self._waiting.remove(upload)
                self._recorded.append(upload.staged)


def _count(what: list[Any]) -> str:
    return f"{len(what)} artifact{'' if len(what) == 1 else 's'}"


def _listed(names: list[str]) -> str:
    more = [f"{len(names) - NAMES_IN_A_LINE} more"] if len(names) > NAMES_IN_A_LINE else []
    return ", ".join([*names[:NAMES_IN_A_LINE], *more])
