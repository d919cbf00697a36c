"""Writing checkpoints: in the background, whole or absent. Copy, write, commit, prune."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from harness.checkpoint import (
    FORMAT_VERSION,
    STATE_FILE,
    CheckpointConfig,
    digest_of,
    list_checkpoints,
    put_in_place,
    rng_file,
    sync,
)
from harness.host_copies import HostCopies
from harness.lock import Lock
from harness.state import TRAINER_STATE_FILE, write_json

logger = logging.getLogger(__name__)

LONG_WAIT_SECONDS = 1.0


class CheckpointError(Exception):
    """A checkpoint could not be written; the older ones are as they were."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """
    What a save writes: `write_model` the weights, `files` torch states by name, `trainer_state` the Trainer's JSON.

    `write_shards` is collective: each rank writes its own part into the folder, before the training goes on. `others`
    are files by name and what writes each. Weights that `are_copies` nobody else writes to. `rank_state` is this
    rank's alone: generators, and what it has not reported. `shared` is ours, plain JSON.
    """

    step: int
    weights: Mapping[str, torch.Tensor]
    write_model: Callable[[Path, Mapping[str, torch.Tensor]], object]
    files: Mapping[str, Any]
    trainer_state: Mapping[str, Any]
    rank_state: Mapping[str, Any]
    shared: Mapping[str, Any]
    others: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    write_shards: Callable[[Path], None] | None = None
    are_copies: bool = False


class Checkpoints:
    """
    The checkpoints of one run on disk. Rank zero writes them all, one at a time, in a thread of its own.

    - ranks: this one, and how many there are.
    - agree: collective; it takes this rank's error or None and returns the first error of any rank; a barrier too.
    - gather: collective; a value of each rank, in their order.

    With a `lock` on the folder nothing is put in place once another process has it.
    """

    def __init__(
        self,
        output_dir: Path,
        config: CheckpointConfig,
        *,
        ranks: tuple[int, int],
        agree: Callable[[BaseException | None], str | None],
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self.output_dir, self.config = output_dir, config
        self.process_index, self.num_processes = ranks
        self.agree, self.gather = agree, gather
        self.lock: Lock | None = None
        self.saved_step: int | None = None
        self.num_saves, self.held_seconds, self.longest_seconds = 0, 0.0, 0.0
        self._begun_step: int | None = None
        self._failure = ""
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes what is not its own alone."""
        return self.process_index == 0

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.output_dir / f"checkpoint-{step}"

    def save(self, content: Content, *, best: str | None = None, then: Callable[[Path], None] | None = None) -> None:
        """
        Collective: begin to write `checkpoint-N`; with `--async_save` the training goes on when its state is copied.

        A save still under way is waited for. When the new one is on disk and whole, the writer calls `then` with its
        folder and deletes what `save_total_limit` does not keep, never the `best`. A save that fails is said at once
        and costs nothing but itself: the next one tries anew, `settle` and `check_last` tell all ranks.
        """
        self.settle()
        began = time.monotonic()
        rank_states = self.gather(content.rank_state)
        self._begun_step = content.step
        has_shards = content.write_shards is not None and not self.config.save_only_model
        if has_shards and not self._write_shards(content):
            return
        if self.is_writer:
            weights, files = content.weights, content.files
            if self.config.async_save:
                copied = {} if content.are_copies else dict(weights)
                copied, files, rank_states = self._copies.copy((copied, dict(files), rank_states))
                weights = weights if content.are_copies else copied
            arguments = (replace(content, weights=weights, files=files), rank_states, best, then)
            self._thread = threading.Thread(target=self._work, args=arguments, name="checkpoint-writer")
            self._thread.start()
        self.num_saves += 1
        self.held_seconds += time.monotonic() - began
        if not self.config.async_save:
            self.settle()

    def _write_shards(self, content: Content) -> bool:
        """Collective: all ranks write what is theirs; whether all could. A failure is like one of the writer."""
        partial = Path(self.gather(str(self._partial(content.step)))[0])  # rank zero's: it has the lock
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
            return True
        self._failure = f"checkpoint-{content.step} could not be written to {self.output_dir}: {message}"
        self._begun_step = None
        if self.is_writer:
            shutil.rmtree(partial, ignore_errors=True)
            logger.error("%s, the training goes on. The older checkpoints are untouched.", self._failure)
        return False

    def settle(self) -> None:
        """
        Collective: wait until the save under way is on disk, or has failed; `saved_step` says which.

        An error that is not the disk's raises on rank zero, where it happened, and CheckpointError on the others.
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

    def _agreed(self, error: BaseException | None) -> str | None:
        """
        Collective: the first error of a disk that any rank met.

        Another one raises where it happened, and CheckpointError on the other ranks.
        """
        disk, other = (error, None) if isinstance(error, OSError) else (None, error)
        bug, message = self.agree(other), self.agree(disk)
        if error is not None and other is not None:
            raise error
        if bug is not None:
            raise CheckpointError(f"checkpoint-{self._begun_step} could not be made: {bug}.")
        return message

    def wait(self) -> None:
        """Local: wait for the writer. For an end by an error, when other ranks may be gone."""
        if self._thread is None:
            return
        began = time.monotonic()
        self._thread.join()
        self._thread = None
        waited = time.monotonic() - began
        self.held_seconds += waited
        if waited > LONG_WAIT_SECONDS and self.config.async_save:
            logger.warning("The training waited %.1f s until checkpoint-%d was written.", waited, self._begun_step)

    def check_last(self) -> None:
        """Collective: raise CheckpointError on all ranks if the last save has failed."""
        self.settle()
        if self._failure:
            raise CheckpointError(
                f"{self._failure}. The older ones are untouched; "
                "make room, then go on with --resume_from_checkpoint true."
            )

    def together(self, act: Callable[[], None]) -> None:
        """
        Collective: each rank acts; all go on when all are done, or none does.

        Raises CheckpointError on all ranks if one could not write; any other error where it happened.
        """
        failure: BaseException | None = None
        try:
            act()
        except Exception as error:  # told to the other ranks, then raised
            failure = _of_disk(error)
        message = self.agree(failure)
        if failure is not None and not isinstance(failure, OSError):
            raise failure
        if message is not None:
            raise CheckpointError(
                f"The model could not be written to {self.output_dir}: {message}. The checkpoints are untouched; "
                "make room, then go on with --resume_from_checkpoint true."
            ) from failure

    def seconds_to_save(self) -> float:
        """Rank zero: how long the longest save took till it was on disk, or twice that while one is being written."""
        is_writing = self._thread is not None and self._thread.is_alive()
        return self.longest_seconds * (2 if is_writing else 1)

    def describe(self) -> str:
        """What the saves cost: how long the training stood still for them, and the memory of the copies."""
        held = self.held_seconds / max(self.num_saves, 1)
        copies = f", copies take {self._copies.num_bytes / 2**20:.0f} MiB" if self._copies.num_bytes else ""
        return f"{self.num_saves} saved, the training held for {held:.2f} s each{copies}"

    def keep_only(self, best: str) -> None:
        """Rank zero: delete all but the best, as the Trainer does at the end with save_total_limit 1."""
        if self.is_writer:
            for path in list_checkpoints(self.output_dir):
                if path.name != Path(best).name:
                    shutil.rmtree(path)

    # The writer's thread

    def _work(
        self, content: Content, rank_states: list[Any], best: str | None, then: Callable[[Path], None] | None
    ) -> None:
        began = time.monotonic()
        final = self.path_of(content.step)
        partial = self._partial(content.step)
        try:
            self._write(content, rank_states, partial)
            self._commit(content, partial, final)
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
            if then is not None:
                then(final)
        except Exception as error:  # told to all ranks at the next save, or at the end
            self._error = _of_disk(error)
            shutil.rmtree(partial, ignore_errors=True)  # whatever fills the disk, it is not this
            if isinstance(self._error, OSError):
                logger.error(
                    "%s could not be written, the training goes on: %s. The older checkpoints are untouched; "
                    "the next save tries anew.",
                    *(final.name, self._error),
                )
            return
        try:
            self._prune(final, best)
        except OSError as error:
            logger.warning("Older checkpoints could not be deleted: %s", error)

    def _partial(self, step: int) -> Path:
        # A writer that was shut out may still be at the same step.
        token = "" if self.lock is None else f".{self.lock.token}"
        return self.path_of(step).with_name(f"checkpoint-{step}{token}.partial")

    def _write(self, content: Content, rank_states: list[Any], folder: Path) -> None:
        if content.write_shards is None or self.config.save_only_model:
            _fresh(folder)
        content.write_model(folder, content.weights)
        write_json(folder / TRAINER_STATE_FILE, content.trainer_state)
        if self.config.save_only_model:
            return
        for name, state in content.files.items():
            torch.save(state, folder / name)
        for name, write in content.others.items():
            write(folder / name)
        for i, state in enumerate(rank_states):
            torch.save(dict(state), folder / rng_file(i, self.num_processes))

    def _commit(self, content: Content, partial: Path, final: Path) -> None:
        """Sync all files, write the manifest last, rename: from then on it is there, and whole."""
        files = {}
        for path in sorted(partial.rglob("*")):
            sync(path)
            if path.is_file():
                name = path.relative_to(partial).as_posix()
                files[name] = {"size": path.stat().st_size, "sha256": digest_of(path)}
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": content.step,
            "world_size": self.num_processes,
            "only_model": self.config.save_only_model,
            "files": files,
            **content.shared,
        }
        write_json(partial / STATE_FILE, manifest)
        sync(partial / STATE_FILE)
        sync(partial)
        if self.lock is not None and self.lock.is_lost():
            raise CheckpointError(
                f"Another process has taken over {self.output_dir}: this one ends, {final.name} is not put there."
            )
        put_in_place(partial, final)

    def _prune(self, saved: Path, best: str | None) -> None:
        """
        Delete the oldest checkpoints beyond `save_total_limit`; never the one just saved, never the best.

        Those of later steps go first: the run was resumed before them and will write them again.
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
        for path in [path for path in checkpoints if path.name not in protected][: max(excess, 0)]:
            shutil.rmtree(path)


def _fresh(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _of_disk(error: Exception) -> Exception:
    """The error, as OSError where it is the disk's: safetensors and torch speak of a full one in types of their own."""
    if not isinstance(error, (SafetensorError, RuntimeError)):
        return error
    words = ("I/O error", "iostream error", "PytorchStreamWriter", "inline_container", "file write failed")
    is_of_disk = any(each in str(error) for each in words)
    return OSError(str(error)) if is_of_disk else error
