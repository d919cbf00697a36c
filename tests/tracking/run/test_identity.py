"""Which W&B run an attempt belongs to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from harness.errors import ConfigError
from harness.tracking import TrackingConfig
from harness.tracking.run.identity import IDENTITY_FILE, Identity, choose, parse, read, write

OLD = Identity(run_id="old", project="p", entity="e", first_step=0, mode="online")
FORK = Identity(run_id="fork", project="p", entity="e", group="old", first_row=7, first_step=0, forked_from="old")


def chosen(
    found: Identity | None = None, saved: Identity | None = None, *, rows: int = 7, resumes: bool = True, **flags: Any
) -> Identity:
    return choose(TrackingConfig(**flags), found=found, saved=saved, rows=rows, resumes=resumes)


def test_a_restart_goes_on_with_the_run_of_its_folder() -> None:
    assert chosen(OLD, OLD) == OLD
    assert chosen(OLD, None, rows=0) == OLD, "killed before the first checkpoint"
    assert chosen(OLD, OLD, wandb_run_id="old", wandb_project="p", wandb_entity="e") == OLD


def test_a_checkpoint_on_an_empty_machine_names_its_run() -> None:
    assert chosen(None, OLD) == OLD


def test_a_checkpoint_of_elsewhere_goes_before_a_folder_of_another_run() -> None:
    assert chosen(Identity(run_id="stranger"), OLD) == OLD


def test_without_a_resume_it_is_a_new_run() -> None:
    new = chosen(OLD, None, rows=0, resumes=False)
    assert new.run_id not in ("old", "")
    assert (new.first_row, new.first_step, new.mode) == (0, 0, "")
    assert new.run_id != chosen(None, None, rows=0, resumes=False).run_id


def test_an_id_that_was_asked_for_begins_where_the_training_is() -> None:
    assert chosen(None, None, rows=0, wandb_run_id="mine") == Identity(run_id="mine", first_row=0, first_step=None)
    other = chosen(OLD, OLD, wandb_run_id="mine")
    assert (other.run_id, other.first_row, other.first_step, other.forked_from) == ("mine", 7, None, "old")


def test_a_fork_is_a_new_run_in_one_group_with_the_old_and_a_restart_goes_on_with_it() -> None:
    fork = chosen(OLD, OLD, wandb_fork=True)
    assert fork.run_id != "old"
    assert (fork.group, fork.first_row, fork.first_step, fork.forked_from) == ("old", 7, 0, "old")
    assert chosen(FORK, OLD, wandb_fork=True) == FORK, "killed before its first checkpoint"
    assert chosen(FORK, FORK, rows=9, wandb_fork=True) == FORK
    assert chosen(None, FORK, wandb_fork=True).forked_from == "fork"
    assert chosen(OLD, OLD, wandb_fork=True, wandb_run_group="mine").group == "mine"


@pytest.mark.parametrize(
    ("saved", "flags", "message"),
    [
        (None, {"wandb_fork": True}, "--wandb_fork: there is no run to fork"),
        (OLD, {"wandb_project": "other"}, "--wandb_project=other, but the run that goes on, old, is in p"),
        (OLD, {"wandb_entity": "other"}, "--wandb_entity=other, but the run that goes on, old, is in e"),
    ],
)
def test_what_can_not_be_is_refused(saved: Identity | None, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(saved, saved, **flags)


def test_it_comes_back_from_the_disk_and_from_a_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(tmp_path) is None
    write(tmp_path, FORK)
    assert read(tmp_path) == FORK
    assert [path.name for path in tmp_path.iterdir()] == [IDENTITY_FILE]
    offline = Identity(run_id="r", mode="offline", offline_folders={"wandb/offline-run-1-r": 3})
    write(tmp_path, offline)
    assert json.loads((tmp_path / IDENTITY_FILE).read_text())["fragments"] == {"wandb/offline-run-1-r": 3}
    assert read(tmp_path) == offline, "under the name that the first versions gave it"
    kept = parse(FORK.of_checkpoint() | {"of_a_newer_version": 1})
    assert kept is not None
    assert (kept.run_id, kept.first_row, kept.offline_folders, kept.processes) == ("fork", 7, {}, {})
    (tmp_path / IDENTITY_FILE).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) is None
    assert "can't be read, the checkpoint says which run it is" in caplog.text
