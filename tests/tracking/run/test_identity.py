"""Which W&B run an attempt belongs to."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import ConfigError
from harness.tracking import TrackingConfig
from harness.tracking.run.identity import IDENTITY_FILE, Identity, choose, named, parse, read, write

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


TINY = replace(OLD, name="tiny", artifacts="tiny")


@pytest.mark.parametrize("name", ["WANDB_NAME", "run_name"])
def test_a_checkpoint_of_elsewhere_under_another_name_is_a_new_run_unless_it_is_asked_for_by_its_id(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags: dict[str, Any] = {"run_name": "mine"} if name == "run_name" else {}
    if not flags:
        monkeypatch.setenv("WANDB_NAME", "mine")
    for saved, called in ((TINY, "called tiny"), (replace(TINY, name=""), "called by W&B")):
        for found in (None, Identity(run_id="stranger")):
            caplog.clear()
            new = chosen(found, saved, **flags)
            assert new.run_id not in ("old", "stranger")
            assert (new.first_row, new.first_step, new.forked_from, new.mode) == (7, 0, "old", "")
            assert f"is of the W&B run old, {called}, and lies elsewhere: mine is a new run" in caplog.text
            assert "give --wandb_run_id old" in caplog.text
    assert chosen(new, TINY, **flags) == new, "killed before its first checkpoint"
    assert chosen(None, TINY, wandb_run_id="old", **flags) == TINY, "asked for"
    assert chosen(None, OLD, **flags) == OLD, "saved before names were"
    assert chosen(TINY, TINY, **flags) == TINY, "renamed where it lies"


def test_a_checkpoint_of_elsewhere_goes_on_under_its_own_name_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(None, TINY) == TINY
    assert chosen(None, TINY, run_name="tiny") == TINY
    monkeypatch.setenv("WANDB_NAME", "tiny")
    assert chosen(None, TINY) == TINY


def test_the_names_of_a_run_and_of_its_artifacts_stay_until_another_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(identity: Identity, **flags: Any) -> tuple[str | None, str | None]:
        found = named(identity, TrackingConfig(**flags), tmp_path)
        return found.name, found.artifacts

    new = Identity(run_id="id")
    assert names(new) == ("", "id")
    assert names(new, run_name="tiny") == ("tiny", "tiny")
    assert names(new, run_name=str(tmp_path)) == (str(tmp_path), "id"), "a path is no name for an artifact"
    assert names(TINY) == ("tiny", "tiny")
    assert names(TINY, run_name="other") == ("other", "other")
    assert names(OLD) == (None, "old"), "as the version before, which did not say how it was called"
    assert names(OLD, run_name="tiny") == ("tiny", "tiny")
    monkeypatch.setenv("WANDB_NAME", "tiny")
    assert names(new) == ("tiny", "id"), "as the Trainer"
    assert names(TINY) == ("tiny", "tiny")
    assert names(replace(new, name="tiny", artifacts="id"), run_name="tiny") == ("tiny", "id")


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
    kept = parse(TINY.of_checkpoint())
    assert kept is not None
    assert (kept.name, kept.artifacts) == ("tiny", "tiny")
    kept = parse(FORK.of_checkpoint() | {"of_a_newer_version": 1})
    assert kept is not None
    assert (kept.run_id, kept.first_row, kept.offline_folders, kept.processes) == ("fork", 7, {}, {})
    (tmp_path / IDENTITY_FILE).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) is None
    assert "can't be read, the checkpoint says which run it is" in caplog.text
