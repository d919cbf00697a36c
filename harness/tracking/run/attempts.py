"""One W&B run for all attempts at a training: a restart opens it where it was left, and sends each row once."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.checkpoint.processes import is_running
from harness.errors import ConfigError
from harness.tracking.client import failures, one_line
from harness.tracking.flags import TrackingConfig
from harness.tracking.rows.beyond import Source
from harness.tracking.rows.events import num_beyond
from harness.tracking.rows.history import History
from harness.tracking.rows.journal import JOURNAL_FILE, Journal
from harness.tracking.rows.server import num_behind, rows_between
from harness.tracking.rows.wandb_file import TORN, mark_synced, read_rows, seal_all
from harness.tracking.run import identity as identities
from harness.tracking.run.identity import Identity
from harness.tracking.run.open import open_run
from harness.tracking.run.wandb_core import describe_processes, wait_for_cores

logger = logging.getLogger(__name__)


class Attempts:
    """
    Opens the W&B run that all attempts at a training share. On rank zero only.

    - output_dir: its folder, where the journal and the run's identity are.
    - resumes: whether this attempt was asked to go on with an earlier one, if there is one.
    """

    def __init__(self, output_dir: Path, *, resumes: bool) -> None:
        self.output_dir = output_dir
        self.identity: Identity | None = None
        self._resumes = resumes
        self._saved: Identity | None = None
        self._rows = 0
        self._changes = ""
        self._checkpoint: Path | None = None

    @property
    def journal_path(self) -> Path:
        """The file that has the rows, whatever becomes of W&B."""
        return self.output_dir / JOURNAL_FILE

    def load_state_dict(self, saved: Mapping[str, Any], folder: Path, *, changes: str) -> None:
        """Take what a checkpoint says of the run. `changes` says why the numbers differ from there on, or is ""."""
        self._rows, self._changes, self._checkpoint = int(saved.get("rows", 0)), changes, folder
        self._saved = identities.parse(saved.get("run") or {})

    def open(
        self, config: TrackingConfig, init_kwargs: Mapping[str, Any], *, stop: Callable[[], None]
    ) -> tuple[Any, History]:
        """
        Return the open run, None if it can't be opened now, and its rows. Raises ConfigError for what can't go on.

        The identity is written before wandb opens the run, so that a kill in between does not make two runs of one.
        """
        found = identities.read(self.output_dir)
        identity = identities.choose(config, found=found, saved=self._saved, rows=self._rows, resumes=self._resumes)
        identity = identities.named(identity, config, self.output_dir)
        is_known = self._resumes and identity.run_id in [each.run_id for each in (found, self._saved) if each]
        goes_on = is_known and (found is None or found.run_id == identity.run_id)
        journal = self._journal(identity, before=None if goes_on else found, goes_on=goes_on)
        if found is not None:
            wait_for_cores(found.processes)
        wandb_dir = Path(str(init_kwargs.get("dir") or self.output_dir)) / "wandb"
        folders = self._folders(identity, wandb_dir) if goes_on else []
        counts = seal_all(folders, identity.run_id)
        elsewhere = self._steps_of_checkpoint(identity, journal)
        mode = identity.mode if config.wandb_mode == "auto" else config.wandb_mode
        was_online = identity.mode == "online"
        identity = replace(
            identity,
            project=identity.project or str(init_kwargs.get("project") or ""),
            entity=identity.entity or init_kwargs.get("entity"),
            offline_folders=self._counted(identity, counts),
            steps_elsewhere=elsewhere if found is None and is_known else identity.steps_elsewhere,
            exit_code=None,
        )
        self._keep(identity)
        run = None
        if was_online and mode == "offline":
            logger.warning(
                "The run is online: what W&B has of it is not known offline. Its rows are kept in %s.", journal.path
            )
        else:
            kwargs = {"mode": mode or "auto", **self._kwargs(init_kwargs, identity, config, is_new=not is_known)}
            run = open_run(config, kwargs, stop=stop, must_be_online=was_online)
        have, offset = self._have(run, identity, journal)
        first_step = identity.first_step if identity.first_step is not None else have or 0
        history = History(
            journal,
            rows=self._rows,
            first_row=identity.first_row,
            first_step=first_step,
            have=have,
            source=self._source(run, identity),
        )
        if run is not None:
            self._opened(identity, run, first_step)
            history.begin(run, offset=offset)
            if not run.offline:
                mark_synced(folders, identity.run_id)
            if identity.forked_from is not None:
                run.config.update({"forked_from": identity.forked_from}, allow_val_change=True)
        return run, history

    def has_lost_its_cores(self, *, patience: float) -> bool:
        """Whether wandb's processes of the open run are gone, or go within `patience` seconds."""
        processes = self.identity.processes if self.identity is not None else {}
        cores = processes.get("cores", [])
        deadline = time.monotonic() + patience
        while any(is_running(*core) for core in cores) and time.monotonic() < deadline:
            time.sleep(0.02)
        return bool(cores) and not any(is_running(*core) for core in cores)

    def reopen(
        self, config: TrackingConfig, init_kwargs: Mapping[str, Any], *, rows: int, stop: Callable[[], None]
    ) -> tuple[Any, History] | None:
        """After the death of wandb's processes: `open` as the next attempt does, with all `rows` made; None: failed."""
        import wandb

        with suppress(*failures()):
            wandb.teardown()
        self._resumes, self._saved, self._rows, self._changes = True, self.identity, rows, ""
        try:
            return self.open(replace(config, wandb_fork=False), init_kwargs, stop=stop)
        except ConfigError as error:
            reason = str(error)
        except failures() as error:
            reason = one_line(error)
        logger.warning("The run can't be opened again, its rows are kept in %s: %s", self.journal_path, reason)
        return None

    def ended(self, exit_code: int) -> None:
        """Note in the identity how this attempt ended."""
        if self.identity is not None:
            self._keep(replace(self.identity, exit_code=exit_code))

    def _journal(self, identity: Identity, *, before: Identity | None, goes_on: bool) -> Journal:
        """Return the run's journal. Another run's in this folder is renamed; a fork begins with its origin's rows."""
        journal = Journal(self.journal_path)
        if goes_on and self._checkpoint is not None and not journal.path.exists():
            with suppress(OSError):  # an empty machine; where there is none, History says what is missing
                shutil.copyfile(self._checkpoint / JOURNAL_FILE, journal.path)
        if not goes_on and journal.path.is_file():
            # Without a run in the folder and in the checkpoint they are those of this training, made without W&B.
            is_untracked = before is None and self._saved is None and self._checkpoint is not None
            is_own = is_untracked or (before is not None and before.run_id == identity.forked_from)
            aside = journal.path.with_name(f"metrics.{before.run_id if before else 'before'}.jsonl")
            kept = max((end for line, end in journal.lines() if is_own and line["_row"] < self._rows), default=0)
            journal.path.replace(aside)
            shutil.copyfile(aside, journal.path)
            os.truncate(journal.path, kept)
            if is_untracked:
                aside.unlink()
        elif goes_on and self._changes:
            beyond = num_beyond(line for line, _ in journal.lines() if line["_row"] >= self._rows)
            if not beyond and identity.mode == "online":  # sent from another folder
                beyond = num_behind(identity, self._steps_of_checkpoint(identity, journal))
            if beyond:
                raise ConfigError(
                    f"{self._changes}, but the run in W&B has {beyond} rows beyond the checkpoint, made as before: "
                    "give --wandb_fork to go on as a new run beside it."
                )
        return journal

    def _folders(self, identity: Identity, wandb_dir: Path) -> list[Path]:
        """The offline run folders of the attempts before that are still there."""
        listed = {(self.output_dir / name).resolve() for name in identity.offline_folders}
        # Not by the folder's name: another run's id may begin like this one's.
        files = wandb_dir.glob(f"offline-run-*/run-{glob.escape(identity.run_id)}.wandb")
        present = {path.parent.resolve() for path in files}
        return sorted(path for path in listed | present if path.is_dir())

    def _counted(self, identity: Identity, counts: Mapping[Path, int]) -> dict[str, int | None]:
        """The offline run folders with their rows: those that are there, and those that were counted before."""
        places = {name: self.output_dir / name for name in identity.offline_folders}
        gone = {
            name: identity.offline_folders[name]
            for name, place in places.items()
            # Where the folder of folders is gone too it is another machine, whose disk nobody has synced.
            if place.parent.is_dir() and not (place.is_dir() or place.with_name(f"{TORN}{place.name}").is_dir())
        }
        return {**gone, **{self._relative(folder): rows for folder, rows in counts.items()}}

    def _steps_of_checkpoint(self, identity: Identity, journal: Journal) -> int:
        """The steps of the rows that the checkpoint counts, all that is known of a run that only a checkpoint names."""
        rows = (line["_step"] for line, _ in journal.lines() if identity.first_row <= line["_row"] < self._rows)
        return max((identity.first_step or 0) + self._rows - identity.first_row, max(rows, default=-1) + 1)

    def _have(self, run: Any, identity: Identity, journal: Journal) -> tuple[int | None, int]:
        """Return how many steps W&B has of the run (None: unknown), and which of them is step 0 of the open run."""
        if run is None:
            return None, 0
        if not run.offline:
            return int(run.starting_step), 0
        if None in identity.offline_folders.values():
            # Synced and deleted, `wandb sync --clean`: all of it has arrived.
            last = max((line["_step"] for line, _ in journal.lines()), default=-1)
            return last + 1, last + 1
        have = identity.steps_elsewhere + sum(steps or 0 for steps in identity.offline_folders.values())
        return have, have

    def _source(self, run: Any, identity: Identity) -> Source | None:
        """Return where rows can be read back: from W&B, or from the offline run folders that are there."""
        if run is not None and not run.offline:
            return Source(read=partial(rows_between, run.settings), is_shared=True)
        if run is None or None in identity.offline_folders.values():
            return None

        def read(first: int, end: int) -> Iterator[dict[str, Any]]:
            offset = identity.steps_elsewhere
            for name, steps in identity.offline_folders.items():
                path = self.output_dir / name / f"run-{identity.run_id}.wandb"
                if offset + (steps or 0) > first and path.is_file():
                    rows = ({**row, "_step": offset + row["_step"]} for row in read_rows(path))
                    yield from (row for row in rows if first <= row["_step"] < end)
                offset += steps or 0

        return Source(read=read, is_shared=False)

    def _opened(self, identity: Identity, run: Any, first_step: int) -> None:
        folders = dict(identity.offline_folders)
        if run.offline:
            folders[self._relative(Path(run.settings.sync_dir).resolve())] = None
        self._keep(
            replace(
                identity,
                project=run.project or identity.project,
                entity=run.entity or identity.entity,
                group=run.group or identity.group,
                mode="offline" if run.offline else "online",
                first_step=first_step,
                offline_folders=folders,
                processes=describe_processes(),
            )
        )

    def _keep(self, identity: Identity) -> None:
        self.identity = identity
        identities.write(self.output_dir, identity)

    def _kwargs(
        self, init_kwargs: Mapping[str, Any], identity: Identity, config: TrackingConfig, *, is_new: bool
    ) -> dict[str, Any]:
        kwargs = dict(init_kwargs) | {"id": identity.run_id}
        if not is_new or config.wandb_run_id:
            asked = config.wandb_resume
            kwargs["resume"] = "allow" if asked in (None, "auto") else asked
        for name in ("project", "entity", "group"):
            if getattr(identity, name):
                kwargs[name] = getattr(identity, name)
        if identity.name and identity.mode != "online":  # else W&B has it, or another that it was given in the app
            kwargs["name"] = identity.name
        return kwargs

    def _relative(self, folder: Path) -> str:
        root = self.output_dir.resolve()
        return os.path.relpath(folder, root) if folder.is_relative_to(root) else str(folder)
