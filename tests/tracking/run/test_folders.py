"""The offline run folders of a run are found by its whole id, whatever characters it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.tracking.run.attempts import Attempts
from harness.tracking.run.identity import Identity
from tests.support.wandb.file import records_of, written


@pytest.mark.parametrize("run_id", ["exp1", "a[1]", "a*", "[ab]"])
def test_another_runs_folder_is_not_taken_for_this_ones(run_id: str, tmp_path: Path) -> None:
    wandb_dir = tmp_path / "wandb"
    for number, each in enumerate([run_id, f"{run_id}0", f"0-{run_id}", "a1", "aa", "a"]):
        folder = wandb_dir / f"offline-run-20260101_00000{number}-{each}"
        written(folder / f"run-{each}.wandb", records_of(each, start=number, rows=2))
    again = wandb_dir / f"offline-run-20260101_000000-{run_id}-1"  # two of one second
    written(again / f"run-{run_id}.wandb", records_of(run_id, start=0, rows=2))
    attempts = Attempts(tmp_path, resumes=True)
    found = attempts._folders(Identity(run_id=run_id), wandb_dir)
    assert found == sorted([wandb_dir / f"offline-run-20260101_000000-{run_id}", again])
