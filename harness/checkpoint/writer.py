"""Write checkpoints in the background, whole or not at all: copy, write, commit, prune."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from harness.checkpoint.disk import Pace, PacedFolder
from harness.checkpoint.find import list_checkpoints, remove_checkpoint
from harness.checkpoint.flags import CheckpointConfig
from harness.checkpoint.host_copies import HostCopies
from harness.checkpoint.layout import read, rng_file
from harness.checkpoint.lock import Lock
from harness.checkpoint.manifest import FORMAT_VERSION, OWN_DIGEST, STATE_FILE, digest_of_manifest
from harness.checkpoint.rescue import Trial, leave_weights, pickle
from harness.errors import CheckpointError, ConfigError
from harness.files import put_in_place, sync, write_json
from harness.training.state import TRAINER_STATE_FILE

logger = logging.getLogger(__name__)

LONG_WAIT_SECONDS = 1.0


@dataclass(kw_only=True)
class Content:
    """
    The content of a save, filled part by part (snapshot.py).

    - weights, write_model: tensors, and the function that writes them into a folder; with `are_copies` nothing else
      changes the tensors.
    - files: torch states by file name. trainer_state: the Trainer's JSON. shared: our own plain values.
    - others: files by name, with the function that writes each.
    - rank_state: the state of this rank alone: generators, and losses it has not reported.
    - rank_files: torch states by file name that this rank writes itself, in the background; either every rank has some
      or none has.
    - write_shards: collective; each rank writes its own part into the folder, before the training goes on.
    """

    step: int
    weights: Mapping[str, torch.Tensor]
    write_model: Callable[[Path, Mapping[str, torch.Tensor]], object]
    are_copies: bool = False
    files: dict[str, Any] = field(default_factory=dict)
    trainer_state: Mapping[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    others: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    rank_state: dict[str, Any] = field(default_factory=dict)
    rank_files: Mapping[str, Any] = field(default_factory=dict)
    write_shards: Callable[[Path], None] | None = None

    @property
    def is_shared(self) -> bool:
        """Whether other ranks than rank zero write into the folder."""
        return self.write_shards is not None or bool(self.rank_files)

    def write(self, folder: PacedFolder, rank_states: Sequence[Mapping[str, Any]], *, only_model: bool) -> None:
        """Rank zero: write its files. Creates the folder, unless it is shared with other ranks and exists."""
        if not self.is_shared:
            _fresh(folder.path)
        folder.save_model(self.weights, self.write_model)
        self.write_states(folder, rank_states, only_model=only_model)

    def write_states(self, folder: PacedFolder, rank_states: Sequence[Mapping[str, Any]], *, only_model: bool) -> None:
        """Rank zero: write what there is beside the model, into a folder that exists."""
        write_json(folder.path / TRAINER_STATE_FILE, self.trainer_state)
        if only_model:
            return
        for name, state in self.files.items():
            folder.save(name, state)
        for name, write in self.others.items():
            write(folder.path / name)
        for i, state in enumerate(rank_states):
            folder.save(rng_file(i, len(rank_states)), dict(state))


class Checkpoints:
    """
    The checkpoints of one run on disk. Rank zero writes all of them, one at a time, in a background thread.

    Where the optimizer is sharded (FSDP2) each rank writes its own shard in such a thread.

    - ranks: the index of this rank, and the number of ranks.
    - agree: collective; takes this rank's error or None and returns the first error of any rank; also a barrier.
    - gather: collective; returns the values of all ranks, in rank order.
    - meet: as `agree`, among the writers' threads.
    - share: of a core that the thread takes, until somebody waits for it (see Pace).

    With a `lock` on the folder nothing is put in place after a takeover by another process.
    """

    def __init__(
        self,
        output_dir: Path,
        config: CheckpointConfig,
        *,
        ranks: tuple[int, int],
        agree: Callable[[BaseException | None], str | None],
        gather: Callable[[Any], list[Any]],
        meet: Callable[[BaseException | None], str | None],
        share: float = 1.0,
    ) -> None:
        self.output_dir, self.config = output_dir, config
        self.share, self._pace = share, Pace()
        self.process_index, self.num_processes = ranks
        self.agree, self.gather, self.meet = agree, gather, meet
        self.lock: Lock | None = None
        self.saved_step: int | None = None
        self.num_saves, self.held_seconds, self.longest_seconds = 0, 0.0, 0.0
        self._begun_step: int | None = None
        self._unsaved: Content | None = None  # what is being written, and what could not be
        self._left_step: int | None = None
        self._undeletable: set[str] = set()
        self._failure = ""
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the files that are common to all ranks."""
        return self.process_index == 0

    @property
    def is_shut_out(self) -> bool:
        """Whether another process has taken over the folder."""
        return self.lock is not None and self.lock.is_lost()

    def path_of(self, step: int) -> Path:
        """Return the path of the checkpoint of a step, whether or not it exists."""
        return self.output_dir / f"checkpoint-{step}"

    def save(self, content: Content, *, best: str | None = None, then: Callable[[Path], None] | None = None) -> None:
        """
        Collective: begin to write `checkpoint-N`; with `--async_save` the training goes on once its state is copied.

        Waits for a save that is still under way. When the new checkpoint is whole on disk, the writer calls `then` with
        its folder and deletes what `save_total_limit` does not keep, never the `best`. A save that fails is logged at
        once and the training goes on: the next save tries again; `settle` and `check_last` tell all ranks.
        """
        self.settle()
        began = time.monotonic()
        rank_states = self.gather(content.rank_state)
        self._begun_step, self._unsaved = content.step, content
        if self.config.save_only_model:
            content = replace(content, write_shards=None, rank_files={})
        partial: Path | None = self._partial(content.step)
        if content.is_shared and (partial := self._begin_together(content)) is None:
            return
        copied: tuple[Content, list[Any]] | None = None
        if self.is_writer or content.rank_files:
            copied = self._copied(content, rank_states) if self.config.async_save else None
            self._unsaved = copied[0] if copied is not None else content
            self._pace = Pace(self.share if copied is not None else 1.0)
            arguments = (*(copied or (content, rank_states)), partial, best, then)
            self._thread = threading.Thread(target=self._work, args=arguments, name="checkpoint-writer")
            self._thread.start()
        self.num_saves += 1
        self.held_seconds += time.monotonic() - began
        if not self.config.async_save:
            self.settle()
        elif copied is None:
            self.wait()

    def _copied(self, content: Content, rank_states: list[Any]) -> tuple[Content, list[Any]] | None:
        """Local: return copies apart from the training; None, with a warning, if there is no memory for them."""
        own = {} if content.are_copies else dict(content.weights)
        try:
            own, *copies = self._copies.copy((own, content.files, dict(content.rank_files), rank_states))
        except MemoryError as error:
            logger.warning(
                "There is no memory for a copy of checkpoint-%d (%s): the training waits until it is written; "
                "--async_save false does not try.",
                *(content.step, str(error).partition("\n")[0]),
            )
            return None
        files, rank_files, states = copies
        return replace(content, weights=own or content.weights, files=files, rank_files=rank_files), states

    def _begin_together(self, content: Content) -> Path | None:
        """Collective: make the folder and write the shards; returns None if a rank could not, which is logged."""
        partial = Path(self.gather(str(self._partial(content.step)))[0])  # the name is rank zero's, which has the lock
        acts = [_fresh if self.is_writer else lambda _: None, content.write_shards or (lambda _: None)]
        message: str | None = None
        for act in acts:
            error: Exception | None = None
            try:
                act(partial)
            except Exception as raised:  # told to the other ranks
                error = _of_disk(raised)
            message = self._agreed(error)
            if message is not None:
                break
        if message is None:
            return partial
        self._failure = f"checkpoint-{content.step} could not be written to {self.output_dir}: {message}"
        self._begun_step = None
        if self.is_writer:
            shutil.rmtree(partial, ignore_errors=True)
            logger.error("%s, the training goes on. The older checkpoints are untouched.", self._failure)
        return None

    def settle(self) -> None:
        """
        Collective: wait until the save under way is on disk or has failed; sets `saved_step` if it succeeded.

        An error other than the disk's is raised on rank zero, where it happened, and as CheckpointError on the others.
        """
        if self._begun_step is None:
            return
        self.wait()
        error, self._error = self._error, None
        self._failure = self._agreed(error) or ""
        if not self._failure:
            self.saved_step = self._begun_step
        else:
            self._failure = f"checkpoint-{self._begun_step} could not be written to {self.output_dir}: {self._failure}"
        self._begun_step = None

    def _agreed(self, error: Exception | None) -> str | None:
        """
        Collective: return the first disk error of any rank.

        Any other error is raised where it happened, and as CheckpointError on the other ranks.
        """
        disk, other = (error, None) if isinstance(error, OSError) else (None, error)
        bug, message = self.agree(other), self.agree(disk)
        if bug is None:
            return message
        left = self._leave_weights()
        if other is not None:
            if left:
                logger.error("%s", left)
            raise other
        raise CheckpointError(f"checkpoint-{self._begun_step} could not be made: {bug}. {left}".rstrip())

    def _leave_weights(self) -> str:
        """Local: leave the weights of the save that failed, on rank zero; returns a sentence that says where, or ""."""
        unsaved, self._unsaved = self._unsaved, None
        return "" if unsaved is None else self.leave(unsaved.weights, step=unsaved.step)

    def leave(self, weights: Mapping[str, Any], *, step: int) -> str:
        """
        Local: leave weights that could not be saved, where this rank has some; returns a sentence that says where.

        Nothing is left after a takeover by another process.
        """
        if not self.is_writer or not weights or self.is_shut_out or step == self._left_step:
            return ""
        self._left_step = step
        return f"{leave_weights(weights, self.output_dir, step=step)}."

    def wait(self) -> None:
        """Local: hurry the writer's thread and wait for it. For use after an error too: other ranks may have ended."""
        if self._thread is None:
            return
        began = time.monotonic()
        self._pace.hurry()
        self._thread.join()
        self._thread = None
        waited = time.monotonic() - began
        self.held_seconds += waited
        if waited > LONG_WAIT_SECONDS and self.config.async_save:
            logger.warning("The training waited %.1f s until checkpoint-%d was written.", waited, self._begun_step)

    def check_last(self) -> None:
        """Collective: raise CheckpointError on all ranks if the last save has failed; its weights are left."""
        self.settle()
        if self._failure:
            left = self._leave_weights()
            raise CheckpointError(
                f"{self._failure}. The older ones are untouched; "
                f"make room or make it writable, then go on with --resume_from_checkpoint true. {left}".rstrip()
            )

    def together(self, act: Callable[[], None], *, weights: Mapping[str, Any] | None = None, step: int = 0) -> None:
        """
        Collective: run `act` on each rank; all return when all are done, or all raise.

        Raises CheckpointError on all ranks if one could not write; any other error is raised where it happened. Rank
        zero leaves the `weights` then, which are those of a step.
        """
        failure: Exception | None = None
        try:
            act()
        except Exception as error:  # told to the other ranks, then raised
            failure = _of_disk(error)
        message = self.agree(failure)
        left = "" if message is None else self.leave(weights or {}, step=step)
        if failure is not None and not isinstance(failure, OSError):
            if left:
                logger.error("%s", left)
            raise failure
        if message is not None:
            raise CheckpointError(
                f"The model could not be written to {self.output_dir}: {message}. The checkpoints are untouched; "
                f"make room or make it writable, then go on with --resume_from_checkpoint true. {left}".rstrip()
            ) from failure
        if weights is not None:  # they are written, whatever the last checkpoint has come to
            self._unsaved = None

    def rehearse(self, content: Content, trials: Sequence[Trial], *, only_model: bool) -> None:
        """
        Collective: try on rank zero what a save does: each of `trials`, then the states of a checkpoint.

        With `only_model` no checkpoint is due. It happens in the folder of an unfinished save, which is removed again.
        Raises ConfigError on all ranks if anything fails on one of them.
        """
        rank_states, folder = self.gather(content.rank_state), self._partial(content.step)
        tried = [
            Trial("A folder", _fresh),
            *trials,
            Trial("The state of the training", lambda _: self._write_and_read(content, rank_states, folder)),
        ]
        tried = tried[:-1] if only_model else tried
        failure: ConfigError | None = None
        try:
            for trial in tried if self.is_writer else ():
                trial.make(folder)
            if not only_model:
                Trial("The state of the optimizer", lambda _: pickle(content.rank_files)).make(folder)
        except ConfigError as error:
            failure = error
        finally:
            if self.is_writer:
                shutil.rmtree(folder, ignore_errors=True)
        if (message := self.agree(failure)) is not None:
            raise ConfigError(message) from failure

    def _write_and_read(self, content: Content, rank_states: Sequence[Mapping[str, Any]], folder: Path) -> None:
        paced = PacedFolder(folder, Pace())
        content.write_states(paced, rank_states, only_model=self.config.save_only_model)
        if not self.config.save_only_model:
            self._write_manifest(content, paced)
            read(folder, ranks=(0, self.num_processes))

    def seconds_to_save(self) -> float:
        """Rank zero: return how long the longest save has worked, in seconds, or twice that while one is written."""
        is_writing = self._thread is not None and self._thread.is_alive()
        return self.longest_seconds * (2 if is_writing else 1)

    def describe(self) -> str:
        """Return the cost of the saves as text: how long they held up the training, and the memory of the copies."""
        held = self.held_seconds / max(self.num_saves, 1)
        copies = f", copies take {self._copies.num_bytes / 2**20:.0f} MiB" if self._copies.num_bytes else ""
        return f"{self.num_saves} saved, the training held for {held:.2f} s each{copies}"

    def keep_only(self, best: str) -> None:
        """Rank zero: delete all but the best, as the Trainer does at the end with save_total_limit 1."""
        if self.is_writer:
            self._delete([path for path in list_checkpoints(self.output_dir) if path.name != Path(best).name])

    # The writer's thread

    def _work(
        self,
        content: Content,
        rank_states: list[Any],
        partial: Path,
        best: str | None,
        then: Callable[[Path], None] | None,
    ) -> None:
        began, pace = time.monotonic(), self._pace
        pace.begin()
        final, folder = self.path_of(content.step), PacedFolder(partial, pace)
        try:
            self._write_together(content, rank_states, folder)
            if not self.is_writer:
                return
            self._commit(content, folder, final)
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began - pace.rested_seconds)
            self._unsaved = None
            if then is not None:
                then(final)
        except Exception as error:  # told to all ranks at the next save, or at the end
            self._error = _of_disk(error)
            if not self.is_writer:
                return
            shutil.rmtree(partial, ignore_errors=True)  # it must not fill the disk
            if isinstance(self._error, OSError):
                logger.error(
                    "%s could not be written, the training goes on: %s. The older checkpoints are untouched; "
                    "the next save tries again.",
                    *(final.name, self._error),
                )
            return
        self._prune(final, best)

    def _partial(self, step: int) -> Path:
        # After a takeover the earlier writer may still be writing the same step.
        token = "" if self.lock is None else f".{self.lock.token}"
        return self.path_of(step).with_name(f"checkpoint-{step}{token}.partial")

    def _write_together(self, content: Content, rank_states: list[Any], folder: PacedFolder) -> None:
        """Write the folder; collective if there are `rank_files`: then all ranks are done, or each raises."""
        failure: Exception | None = None
        try:
            if self.is_writer:
                content.write(folder, rank_states, only_model=self.config.save_only_model)
            for name, state in content.rank_files.items():
                folder.save(name, state)
        except Exception as error:  # told to the other writers, then raised
            failure = _of_disk(error)
        message = self.meet(failure) if content.rank_files else None
        if failure is not None:
            raise failure
        if message is not None:
            raise OSError(message)

    def _commit(self, content: Content, folder: PacedFolder, final: Path) -> None:
        """Write the manifest last, rename the folder: from then on the checkpoint exists, whole."""
        self._write_manifest(content, folder)
        if self.is_shut_out:
            raise CheckpointError(
                f"Another process has taken over {self.output_dir}: this one ends and does not write {final.name}."
            )
        put_in_place(folder.path, final)

    def _write_manifest(self, content: Content, folder: PacedFolder) -> None:
        """Sync all files, and write their sizes and digests, with the shared values, into a file that is synced too."""
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": content.step,
            "world_size": self.num_processes,
            "only_model": self.config.save_only_model,
            "files": folder.facts(),
            **content.shared,
        }
        write_json(folder.path / STATE_FILE, {**manifest, OWN_DIGEST: digest_of_manifest(manifest)})
        sync(folder.path / STATE_FILE)
        sync(folder.path)

    def _prune(self, saved: Path, best: str | None) -> None:
        """
        Delete the oldest checkpoints beyond `save_total_limit`; never the one just saved, never the best.

        Checkpoints of later steps go first: the run was resumed before them and will write them again.
        """
        limit = self.config.save_total_limit
        if limit is None:
            return
        checkpoints = list_checkpoints(self.output_dir)
        superseded = checkpoints[checkpoints.index(saved) + 1 :]
        checkpoints = [*superseded, *(path for path in checkpoints if path not in superseded)]
        protected = {saved.name}
        if best is not None:
            protected.add(Path(best).name)
        excess = len(checkpoints) - max(limit, len(protected))
        self._delete([path for path in checkpoints if path.name not in protected][: max(excess, 0)])

    def _delete(self, checkpoints: Iterable[Path]) -> None:
        """Delete checkpoints; one that can't be is passed over, which is said once, and tried again at a later save."""
        for path in checkpoints:
            try:
                remove_checkpoint(path)
            except OSError as error:
                if path.name not in self._undeletable:
                    logger.warning(
                        "%s can't be deleted, the training goes on: %s. Delete it by hand.", path.name, error
                    )
                self._undeletable.add(path.name)


def _of_disk(error: Exception) -> Exception:
    """Return the error, as OSError if it comes from the disk: safetensors and torch use own types for a full one."""
    if not isinstance(error, (SafetensorError, RuntimeError)):
        return error
    words = ("I/O error", "iostream error", "PytorchStreamWriter", "inline_container", "file write failed")
    is_of_disk = any(each in str(error) for each in words)
    return OSError(str(error)) if is_of_disk else error


def _fresh(folder: Path) -> None:
    """Make an empty folder, deleting what was there."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
