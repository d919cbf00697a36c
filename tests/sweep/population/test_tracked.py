"""A member in W&B: one run over takeovers and kills, each row once, that says whose checkpoint it goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint.adopt import adopt, pin
from harness.checkpoint.manifest import manifest_of
from harness.tracking import lineage
from tests.support.faulty_training import SAVES, STEPS, Training, committed
from tests.support.wandb_server import WandbServer

LOW, HIGH, NEW = 1e-3, 4e-3, 3e-3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WandbServer]:
    with WandbServer(tmp_path / "server") as running:
        yield running


def begun(folder: Path, server: WandbServer, **more: Any) -> Training:
    given = {"wandb_run_id": None, "run_name": f"study-{folder.name}", "wandb_run_group": "study"}
    given |= {"resume_from_checkpoint": "auto", "eval_strategy": "steps", "eval_steps": 5, "save_total_limit": 1}
    given["task"] = {"times": "times"}  # the arguments of the task are those of the run, in whatever folder
    return Training(folder, server, pace=0.1, variables={"WANDB_SILENT": "true"}, **{**given, **more})


@pytest.mark.slow
def test_a_member_that_takes_anothers_checkpoint_stays_one_run_and_names_it(
    server: WandbServer, tmp_path: Path
) -> None:
    pinned = {}
    for name, rate in (("0", HIGH), ("1", LOW)):
        ended = begun(tmp_path / name, server, learning_rate=rate, stop_at_step=SAVES).ended()
        pinned[name] = tmp_path / f"pinned-{name}"
        pin(ended.output_dir / f"checkpoint-{SAVES}", pinned[name])
    out, arguments = tmp_path / "1" / "out", {"learning_rate": NEW}
    adopt(pinned["0"], pinned["1"], out, arguments=arguments, note={"parent": 0})
    source = manifest_of(pinned["0"])["tracking"]["run"]
    lineage.write(out, {"population": {"member": 1}}, source=source, step=SAVES)

    # A kill between two saves: rows are in W&B that no checkpoint counts, made with the new value.
    changed: dict[str, Any] = {**arguments, "change_on_resume": ["learning_rate"]}
    killed = begun(tmp_path / "1", server, **changed)
    killed.reach(SAVES + 8)
    killed.process.kill()
    killed.process.wait()
    begun(tmp_path / "1", server, **changed).ended()

    run_id = json.loads((out / "wandb_run.json").read_text(encoding="utf-8"))["run_id"]
    run = server.run(run_id)
    assert [row["train/global_step"] for row in run.rows if "train/loss" in row] == list(range(1, STEPS + 1))
    rates = [row["train/learning_rate"] for row in run.rows if "train/loss" in row]
    schedule = [rate * (STEPS - step) / STEPS for step in range(STEPS) for rate in [LOW if step < SAVES else NEW]]
    assert rates == pytest.approx(schedule)
    assert (run.group, run.name, run.state, run.config["learning_rate"]) == ("study", "study-1", "finished", NEW)
    assert run.config["population"] == {"member": 1}
    used = [each for each in committed(server) if {run_id, "study-1"} & {*each.used_by}]
    assert [(each.collection, f"checkpoint_global_step_{SAVES}" in each.aliases) for each in used] == [
        ("checkpoint-study-0", True)
    ]
