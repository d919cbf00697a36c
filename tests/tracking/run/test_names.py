"""The name belongs to the run: a resume without it goes on under it, and another one elsewhere is another run's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty_training import Training, committed
from tests.support.wandb_server import WandbServer

pytestmark = pytest.mark.slow

ARGUMENTS: dict[str, Any] = {"wandb_run_id": None, "save_steps": 5, "variables": {"WANDB_SILENT": "true"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def tiny(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Five steps of a run called tiny."""
    return Training(tmp_path_factory.mktemp("tiny"), server, run_name="tiny", max_steps=5, **ARGUMENTS).ended()


def identity(training: Training) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((training.output_dir / "wandb_run.json").read_text(encoding="utf-8"))
    return found


def collections(server: WandbServer, run_id: str) -> set[str]:
    return {found.collection for found in committed(server) if found.logged_by == run_id}


def test_a_resume_without_the_name_goes_on_under_it(tiny: Training, server: WandbServer, tmp_path: Path) -> None:
    run_id, task = identity(tiny)["run_id"], {"times": str(tiny.times)}
    # In its folder, from a checkpoint in another one, and from the artifact on an empty machine.
    resumes = {"auto": tiny.output_dir, str(tiny.output_dir / "checkpoint-10"): tmp_path / "out"}
    resumes["wandb:checkpoint-tiny:latest"] = tmp_path / "empty"
    for steps, (path, output_dir) in zip((10, 15, 20), resumes.items(), strict=True):
        where = {"resume_from_checkpoint": path, "output_dir": output_dir, "max_steps": steps}
        Training(tmp_path / f"to-{steps}", server, task=task, **where, **ARGUMENTS).ended()
        (run,) = [each for each in server.runs() if each.id == run_id]
        assert (run.name, run.rows[-1]["train/global_step"]) == ("tiny", steps)
        assert collections(server, run_id) == {"model-tiny", "checkpoint-tiny"}
        (newest,) = [found for found in committed(server) if f"checkpoint_global_step_{steps}" in found.aliases]
        assert (newest.collection, "latest" in newest.aliases) == ("checkpoint-tiny", True)


def test_a_checkpoint_of_another_folder_under_another_name_begins_a_new_run(
    tiny: Training, server: WandbServer, tmp_path: Path
) -> None:
    run_id = identity(tiny)["run_id"]
    before = server.run(run_id)
    arguments = {"resume_from_checkpoint": tiny.output_dir / "checkpoint-5", "run_name": "mine", "max_steps": 10}
    task = {"times": str(tiny.times)}
    mine = Training(tmp_path / "mine", server, task=task, **arguments, **ARGUMENTS).ended()
    assert server.run(run_id) == before, "not continued, not renamed"
    new = server.run(identity(mine)["run_id"])
    assert (new.name, new.config["forked_from"], new.state) == ("mine", run_id, "finished")
    assert [row["train/global_step"] for row in new.rows if "train/loss" in row] == [6, 7, 8, 9, 10]
    assert collections(server, new.id) == {"model-mine", "checkpoint-mine"}
    assert f"To go on with that one, give --wandb_run_id {run_id}." in mine.err
    # Started again, it is the new one.
    again = Training(tmp_path / "mine", server, task=task, **{**arguments, "max_steps": 12}, **ARGUMENTS).ended()
    assert identity(again)["run_id"] == new.id
