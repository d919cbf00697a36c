"""A training that has ended goes on with more steps, from any place: no row is lost, none is double, nothing alarms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty_training import Training
from tests.support.wandb_server import WandbServer

pytestmark = pytest.mark.slow

ENDS, GOES_ON = 10, 14
ARGUMENTS: dict[str, Any] = {"wandb_run_id": None, "wandb_log_model": None, "save_steps": ENDS}
ALARMS = ("rows before the checkpoint", "makes other rows", "no longer repeats", "another row")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("server")) as running:
        yield running


def begun(folder: Path, server: WandbServer | None, **more: Any) -> Training:
    """An attempt of the training in `folder`; offline without a server."""
    (folder / "times").unlink(missing_ok=True)
    given = {"variables": {"WANDB_SILENT": "true"}, "task": {"times": "times"}}
    return Training(folder, server, **given, **{**ARGUMENTS, **more})


def trained(folder: Path, server: WandbServer | None, *, max_steps: int, **more: Any) -> Training:
    return begun(folder, server, max_steps=max_steps, **more).ended()


def run_id(training: Training) -> str:
    return str(json.loads((training.output_dir / "wandb_run.json").read_text())["run_id"])


def losses(rows: list[dict[str, Any]]) -> list[int]:
    return [row["train/global_step"] for row in rows if "train/loss" in row]


def ends(rows: list[dict[str, Any]]) -> list[int]:
    own = {"train/global_step", "train/epoch"}
    return [row["train/global_step"] for row in rows if {name for name in row if not name.startswith("_")} == own]


def assert_whole(
    training: Training, server: WandbServer, run: str, *, ended: tuple[int, ...] = (ENDS, GOES_ON)
) -> None:
    rows = server.run(run).rows
    assert losses(rows) == list(range(1, ended[-1] + 1))
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert ends(rows) == [*ended]
    assert not [alarm for alarm in ALARMS if alarm in training.err + training.out], training.err


@pytest.mark.parametrize("place", ["the same folder", "another folder", "an empty machine"])
@pytest.mark.parametrize("evaluates", [False, True], ids=["", "with do_eval"])
def test_a_finished_run_is_extended(place: str, evaluates: bool, server: WandbServer, tmp_path: Path) -> None:
    more: dict[str, Any] = {"wandb_log_model": "checkpoint" if place == "an empty machine" else None}
    if evaluates:
        more |= {"do_train": "true", "do_eval": "true"}
    first = trained(tmp_path / "first", server, max_steps=ENDS, **more)
    run = run_id(first)
    before = len(server.run(run).rows)
    assert before == ENDS + 1 + evaluates
    folder = tmp_path / ("first" if place == "the same folder" else "second")
    checkpoint: Any = first.output_dir / f"checkpoint-{ENDS}"
    if place == "an empty machine":
        shutil.rmtree(first.output_dir)
        checkpoint = f"wandb:checkpoint-{run}:latest"
    second = trained(folder, server, max_steps=GOES_ON, resume_from_checkpoint=checkpoint, **more)
    assert run_id(second) == run
    assert_whole(second, server, run)
    total = GOES_ON + 2 + 2 * evaluates
    assert len(server.run(run).rows) == total
    assert any(line == f"{total} rows, all confirmed by the server" for line in second.report)


@pytest.mark.parametrize("place", ["the same folder", "another folder", "twice in another folder"])
def test_a_finished_offline_run_is_extended(place: str, server: WandbServer, tmp_path: Path) -> None:
    first = trained(tmp_path / "first", None, max_steps=ENDS)
    folder = tmp_path / ("first" if place == "the same folder" else "second")
    checkpoint = first.output_dir / f"checkpoint-{ENDS}"
    last = trained(folder, None, max_steps=GOES_ON, resume_from_checkpoint=checkpoint)
    ended: tuple[int, ...] = (ENDS, GOES_ON)
    if place == "twice in another folder":
        ended = (*ended, GOES_ON + 2)
        last = trained(folder, None, max_steps=GOES_ON + 2, resume_from_checkpoint="auto")
    last.server = server
    if place != "the same folder":
        early = last.type_in(f"harness sync --once {last.output_dir}")
        assert early.returncode == 1
        assert "first bring the folder that its checkpoint is from" in early.stdout + early.stderr
    for each in dict.fromkeys([first.output_dir, last.output_dir, first.output_dir]):
        done = last.type_in(f"harness sync {each}")
        assert done.returncode == 0, done.stdout + done.stderr
    assert_whole(last, server, run_id(first), ended=ended)


def test_other_numbers_are_refused_elsewhere_too_where_wandb_has_rows_beyond_the_checkpoint(
    server: WandbServer, tmp_path: Path
) -> None:
    first = trained(tmp_path / "first", server, max_steps=ENDS, save_steps=4)
    other = {"learning_rate": 5e-3, "allow_changed_arguments": "true", "max_steps": ENDS}
    for step, code in ((4, 2), (ENDS, 0)):  # behind the last one is nothing but its end
        checkpoint = first.output_dir / f"checkpoint-{step}"
        second = begun(tmp_path / f"from-{step}", server, resume_from_checkpoint=checkpoint, **other).ended(code)
        refusal = f"the run in W&B has {ENDS - 4} rows beyond the checkpoint"
        assert (refusal in second.err) is (code == 2)
