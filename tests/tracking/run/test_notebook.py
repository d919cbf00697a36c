"""Which runs are open in a notebook: its own, none of the processes that are launched from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.faulty_training import Training, environment
from tests.support.launching import free_port
from tests.support.wandb.notebook import run_cells
from tests.support.wandb_server import WandbServer

pytestmark = pytest.mark.slow

LAUNCH = """
import accelerate

def train():
    from harness.train import main
    assert main({flags}) == 0

accelerate.notebook_launcher(train, num_processes=2, use_port="{port}")
"""


def test_a_training_ends_the_run_of_the_one_before_and_launched_processes_end_their_own(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    flags: dict[str, list[str]] = {}
    for name in ("first", "launched", "last"):
        (tmp_path / name).mkdir()
        flags[name] = Training.flags_for(tmp_path / name, wandb_run_id=name, max_steps=4)
    train = "from harness.train import main; assert main({flags}) == 0; import wandb; assert wandb.run.id == {name!r}"
    cells = [
        train.format(flags=flags["first"], name="first"),
        LAUNCH.format(flags=flags["launched"], port=free_port()),
        "assert wandb.run.id == 'first'; wandb.log({'after': 1})",
        train.format(flags=flags["last"], name="last"),
        "wandb.finish()",
    ]
    with WandbServer(tmp_path / "server") as server:
        run_cells(cells, environment(tmp_path, server, WANDB_SILENT="true"), folder=tmp_path)
        runs = {run.id: run for run in server.runs()}
    assert {name: (run.state, run.exit_code) for name, run in runs.items()} == dict.fromkeys(flags, ("finished", 0))
    for name, run in runs.items():
        assert run.config["output_dir"] == str(tmp_path / name / "out"), "no training writes into another's run"
    assert runs["first"].rows[-1]["after"] == 1
    for name in ("launched", "last"):
        assert [row["train/global_step"] for row in runs[name].rows] == [1, 2, 3, 4, 4]
