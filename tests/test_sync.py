"""`python -m harness.sync`: offline runs arrive whole, each row once, whatever dies meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty_training import Training, committed, environment
from tests.support.wandb_seen import _untimed
from tests.support.wandb_server import WandbServer

ROWS = 30 + 6 + 1  # a log a step, six evaluations, the end
ARGUMENTS: dict[str, Any] = {
    "wandb_run_id": None,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "resume_from_checkpoint": "auto",
}


def begun(folder: Path) -> Training:
    (folder / "times").unlink(missing_ok=True)
    return Training(folder, None, pace=0.1, variables={"WANDB_MODE": "offline"}, **ARGUMENTS)


def identity(training: Training) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((training.output_dir / "wandb_run.json").read_text())
    return found


class Sync:
    """The command, in a process that can be killed and started again; all lives of it write to one file."""

    def __init__(self, folder: Path, server: WandbServer, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        self.out = folder / "out"
        # A login shell may hold what is meant for the trainings.
        variables = environment(folder, server, WANDB_MODE="offline")
        with self.out.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness.sync", *arguments],
                env=variables,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def wait_for(self, condition: Any, what: str) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.out.read_text()
            assert time.monotonic() < end, f"{what}\n{self.out.read_text()}"
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def parcels_of(server: WandbServer) -> int:
    """How often a run was opened by `wandb sync`."""
    return sum(each["label"] == "graphql UpsertBucket" for each in server.requests())


@pytest.mark.slow
def test_three_live_runs_arrive_whole_though_one_and_the_sync_itself_are_killed(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with WandbServer(tmp_path / "server") as server:
        trainings = [begun(runs / name) for name in ("a", "b", "c")]
        syncs = (tmp_path / "sync", server, str(runs), "--until-finished", "--interval", "1")
        sync = Sync(*syncs)
        for training in trainings:  # held until rows have come: wandb's process writes to its file every 15 s only
            training.reach(14)
            training.process.send_signal(signal.SIGSTOP)
        # Killed while `wandb sync` is at work, which outlives it; and while rows are sent.
        sync.wait_for(lambda: parcels_of(server) > 0, "no run was begun")
        sync.kill()
        sync = Sync(*syncs)
        killed = identity(trainings[0])["run_id"]
        sync.wait_for(lambda: any(run.id == killed and run.rows for run in server.runs()), "no rows came of a live run")
        sync.kill()
        live = server.run(killed)
        assert 0 < len(live.rows) < ROWS
        assert live.state == "running"
        trainings[0].process.kill()
        trainings[0].process.wait()
        sync = Sync(*syncs)
        trainings[0] = begun(runs / "a")
        for training in trainings[1:]:
            training.process.send_signal(signal.SIGCONT)
        for training in trainings:
            training.ended()
        assert sync.process.wait(120) == 0, sync.out.read_text()
        said = sync.out.read_text()
        assert said.splitlines()[-1].endswith("All 3 runs are finished, and W&B has all of them.")
        assert server.unknown() == []
        seen = [server.run(identity(training)["run_id"]) for training in trainings]
        for training, run in zip(trainings, seen, strict=True):
            lines = [json.loads(line) for line in (training.output_dir / "metrics.jsonl").read_text().splitlines()]
            assert [row["_step"] for row in run.rows] == list(range(ROWS))
            kept = [{name: value for name, value in line.items() if name != "_row"} for line in lines]
            assert [{**row, "_runtime": 0} for row in run.rows] == [{**line, "_runtime": 0} for line in kept]
            assert (run.state, run.exit_code) == ("finished", 0)
            assert run.raw_config["_wandb"]["value"]["m"] == seen[0].raw_config["_wandb"]["value"]["m"] != []
            assert {"requirements.txt", "wandb-metadata.json", "output.log"} <= set(run.files)
            assert _untimed(run.summary) == _untimed(seen[1].summary)
            logged = [found for found in committed(server) if found.logged_by == run.id]
            steps = {alias for found in logged for alias in found.aliases if alias.startswith("checkpoint_global")}
            assert steps == {f"checkpoint_global_step_{step}" for step in (10, 20, 30)}
            assert {"base_model", "final_model"} <= {alias for found in logged for alias in found.aliases}
            (latest,) = [each for each in logged if "checkpoint" in each.collection and "latest" in each.aliases]
            assert "checkpoint_global_step_30" in latest.aliases
            weights = latest.contents["model.safetensors"].read_bytes()
            assert weights == (training.output_dir / "model.safetensors").read_bytes()
            assert not (training.output_dir / "wandb-artifacts").exists()
        assert [_untimed(row) for row in seen[0].rows] == [_untimed(row) for row in seen[1].rows]
        assert seen[0].summary["train/global_step"] == 30
        # Again: nothing is sent.
        rows = sum("file_stream" in each["label"] for each in server.requests())
        again = Sync(tmp_path / "sync", server, str(runs), "--once")
        assert again.process.wait(60) == 0, again.out.read_text()
        assert sum("file_stream" in each["label"] for each in server.requests()) == rows
