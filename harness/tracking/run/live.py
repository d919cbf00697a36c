"""The W&B run that is open in this process: its failures are warnings, and after a death of wandb's it is reopened."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any
from weakref import WeakKeyDictionary

from harness.tracking.artifacts.log import Artifacts, open_artifacts
from harness.tracking.artifacts.queue import UploadResult
from harness.tracking.client import failures, forget_run, is_stopped, one_line, separate_randomness
from harness.tracking.flags import TrackingConfig
from harness.tracking.rows.history import History
from harness.tracking.run.attempts import Attempts
from harness.tracking.run.close import PREEMPTED_SECONDS, SYNC, describe_rows, end_run
from harness.tracking.run.open import is_notebook, open_run, where
from harness.tracking.run.wandb_core import abandon_run

logger = logging.getLogger(__name__)

MAX_REOPENED = 3  # in one process: what keeps killing wandb's is not ended by starting another


# Runs that a notebook keeps open after their training, until `wandb.finish()`, as under the Trainer; and its process.
LEFT_OPEN: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class LiveRun:
    """
    The open run with its rows and its artifacts. On rank zero only.

    - run: wandb's own object; None before the start, after the end, and where W&B does not work.
    - history: its rows, each sent once over all attempts; None without `attempts`.
    - artifacts: None without --wandb_log_model.
    - is_own: whether it was opened here; an adopted one is its owner's.
    - where: its address, or its folder and how to upload it; it stays when the run is over.
    """

    def __init__(
        self,
        config: TrackingConfig,
        init_kwargs: Mapping[str, Any],
        *,
        output_dir: Path | None,
        attempts: Attempts | None,
        stop: Callable[[], None],
    ) -> None:
        self.run: Any = None
        self.history: History | None = None
        self.artifacts: Artifacts | None = None
        self.where = ""
        self._config, self._init_kwargs, self._output_dir = config, init_kwargs, output_dir
        self._attempts, self._stop = attempts, stop
        self._setup: list[Callable[[Any], Any]] = []
        self._num_reopened = 0
        self._committed: list[str] = []  # artifacts, before wandb's process has died
        self.is_own = self._is_preempting = self._has_warned = False

    def open(self) -> None:
        """Take over the run that is open, or open one. Raises ConfigError for settings that wandb refuses."""
        import wandb

        separate_randomness()
        if self._attempts is not None and wandb.run in LEFT_OPEN:
            # Of a training before this one in a notebook, whose rows are counted: this is another run.
            if LEFT_OPEN[wandb.run] == os.getpid():
                wandb.finish()
            else:
                forget_run()
        self.is_own = wandb.run is None
        if not self.is_own:
            self.run = wandb.run
        elif self._attempts is None:
            self.run = open_run(self._config, self._init_kwargs, stop=self._stop)
        else:
            self.run, self.history = self._attempts.open(self._config, self._init_kwargs, stop=self._stop)
        self._begin()

    def log(self, row: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
        """Send a row; `kwargs` go to wandb's `log` where the rows are not counted."""
        if self.history is None:
            self.deliver(lambda run: run.log(row, **kwargs))
        else:  # what fails here is in the journal, and sent from there if wandb's process is another then
            history = self.history
            self._try(lambda: history.log(row), again=None)

    def set_up(self, action: Callable[[Any], Any]) -> None:
        """Do something with the run now, and again each time it is opened again after the death of wandb's process."""
        self._setup.append(action)
        self.deliver(action)

    def deliver(self, action: Callable[[Any], Any]) -> Any:
        """Do something with the run, if there is one. The first failure of wandb's is a warning."""
        return None if self.run is None else self._try(lambda: action(self.run), again=action)

    def is_stopped(self) -> bool:
        """Whether W&B says that this run of a sweep is to stop."""
        return self.run is not None and not self.run.offline and is_stopped(self.run.settings)

    def mark_preempting(self) -> None:
        """Tell W&B at once that the run will be preempted. `close` then takes seconds, whatever the network does."""
        self._is_preempting = True
        self.deliver(lambda run: run.mark_preempting())

    def close(self, exit_code: int) -> list[str]:
        """End the run if it was opened here; returns what has arrived of it and what has not. Twice changes nothing."""
        ends = self.is_own and not (exit_code == 0 and is_notebook())
        sent = self.deliver(lambda run: run.step)  # if wandb's process has died, another one ends the run
        # An attempt that another one follows, which delivers what is left, does not wait for slow uploads.
        limit = self._config.wandb_finish_timeout if exit_code else None
        limit = PREEMPTED_SECONDS if self._is_preempting else limit
        if self._attempts is not None:
            self._attempts.ended(exit_code)
        uploads = self._close_artifacts(limit)
        if ends:
            self.deliver(lambda run: end_run(run, exit_code, is_preempting=self._is_preempting))
            uploads = self._close_artifacts(0.0) or uploads
        elif self.is_own and self.run is not None:
            LEFT_OPEN[self.run] = os.getpid()
        run, self.run = self.run, None
        history, self.history = self.history, None
        if history is not None and self._attempts is not None:
            history.close()
            self._attempts.ended(exit_code)
            if run is None:
                path = self._attempts.journal_path
                return [f"{history.rows} rows are in {path}; deliver them: {SYNC} {quote(str(path.parent))}"]
        if run is None:
            return []
        home = self._output_dir if history is not None else None
        rows = describe_rows(run, sent, uploads, home=home) if ends else []
        if uploads is None:
            return rows
        return [*rows, replace(uploads, committed=[*self._committed, *uploads.committed]).describe()]

    def abandon(self) -> None:
        """End wandb's process without ending the run, if it was opened here."""
        if self.is_own:
            abandon_run()

    def _begin(self) -> None:
        """Note where the run is that has just been opened, and take up its artifacts."""
        self.where = "" if self.run is None else where(self.run)
        identity = None if self._attempts is None or not self.is_own else self._attempts.identity
        suffix = None if identity is None else identity.artifacts
        self.artifacts = open_artifacts(self.run, self._config, self._output_dir, suffix=suffix)

    def _close_artifacts(self, limit: float | None) -> UploadResult | None:
        artifacts, self.artifacts = self.artifacts, None
        return None if artifacts is None else artifacts.close(limit)

    def _try(self, action: Callable[[], Any], *, again: Callable[[Any], Any] | None) -> Any:
        """Do it; if wandb's process has died meanwhile, do `again` with the run that is opened then."""
        try:
            return action()
        except failures() as error:
            if self._reopen():
                return None if again is None else self.deliver(again)
            if not self._has_warned:
                logger.warning("W&B failed, the training goes on; rows may be missing: %s", one_line(error))
            self._has_warned = True
        return None

    def _reopen(self) -> bool:
        """Open the run as the next attempt would, if wandb's process has died. Returns whether it is open."""
        attempts, history = self._attempts, self.history
        if attempts is None or history is None or self._is_preempting or self._num_reopened == MAX_REOPENED:
            return False
        if not attempts.has_lost_its_cores(patience=0.0 if self._has_warned else 0.5):
            return False
        self._num_reopened += 1
        logger.warning("wandb's process has died: another one takes over, and gets the rows that were lost with it.")
        before = self._close_artifacts(0.0)  # what W&B lacks stays staged
        self._committed += [] if before is None else before.committed
        history.close()
        reopened = attempts.reopen(self._config, self._init_kwargs, rows=history.rows, stop=self._stop)
        if reopened is None:
            return False
        self.run, self.history = reopened
        self._begin()
        for action in self._setup:
            self.deliver(action)
        return self.run is not None
