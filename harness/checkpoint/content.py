"""What a checkpoint is made of, and its files written into a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint.find import rng_file
from harness.files import write_json
from harness.training.state import TRAINER_STATE_FILE


@dataclass(frozen=True, kw_only=True)
class Content:
    """
    What a save writes: `write_model` the weights, `files` torch states by name, `trainer_state` the Trainer's JSON.

    `write_shards` is collective: each rank writes its own part into the folder, before the training goes on.
    `rank_files` are torch states by name that this rank writes itself, in the background: none on any rank, or some on
    each. `others` are files by name and what writes each. `rank_state` is this rank's alone: generators, and what it
    has not reported. `shared` is ours, plain JSON. Weights that `are_copies` nobody else writes to.
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
    rank_files: Mapping[str, Any] = field(default_factory=dict)
    are_copies: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether ranks write into the folder beside its writer."""
        return self.write_shards is not None or bool(self.rank_files)

    def write(self, folder: Path, rank_states: Sequence[Mapping[str, Any]], *, only_model: bool) -> None:
        """Rank zero: the files that are its to write; the folder is made, unless ranks have already met in it."""
        if not self.is_shared:
            fresh(folder)
        self.write_model(folder, self.weights)
        write_json(folder / TRAINER_STATE_FILE, self.trainer_state)
        if only_model:
            return
        for name, state in self.files.items():
            torch.save(state, folder / name)
        for name, write in self.others.items():
            write(folder / name)
        for i, state in enumerate(rank_states):
            torch.save(dict(state), folder / rng_file(i, len(rank_states)))


def fresh(folder: Path) -> None:
    """An empty folder, whatever was there."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
