"""What W&B has of a training that several processes share, and that was killed, is what it has of one process's."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.utils import is_deepspeed_available
from safetensors.torch import load_file

from tests.support.faulty_training import Training, committed
from tests.support.launching import DDP, ROOT, SCRIPT, launcher
from tests.support.wandb import seen as wandb_seen
from tests.support.wandb.seen import Seen
from tests.support.wandb_server import ArtifactRecord, RunRecord, WandbServer

pytestmark = pytest.mark.timeout(900)

SAVES = 40
ARGUMENTS: dict[str, Any] = {
    # Histograms are due at step 100, and nothing is left to log at the end: in train_loss that is rank zero's alone,
    # as in the Trainer.
    "max_steps": 105,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 20,
    # Alone in its batch each sample weighs the same, whatever the number of processes; 21 are no multiple of two.
    "per_device_eval_batch_size": 1,
    "save_steps": SAVES,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": False,
    "wandb_watch": "all",
    "wandb_eval_samples": 3,
    "wandb_eval_samples_freq": 3,
    "wandb_tags": "one",
    "resume_from_checkpoint": "auto",
}
# In the config: how the processes share the work, and which run it is.
OF_THE_LAUNCH = {"per_device_train_batch_size", "expect_num_processes", "wandb_run_id", "wandb_project", "harness"}
OF_THE_RUN = ("run_id", "saved_at")
TASK = "tests.support.tasks.tracked_task:build"


@dataclass
class Tracked:
    """A run, as the server has it."""

    seen: Seen
    run: RunRecord
    artifacts: list[ArtifactRecord]
    training: Training


def training(folder: Path, server: WandbServer, config: Path | None) -> Training:
    """An attempt: of one process without a launch config."""
    command = None if config is None else (*launcher(config), SCRIPT)
    processes = 1 if config is None else 2
    shared = {"per_device_train_batch_size": 4 // processes, "expect_num_processes": processes}
    (folder / "times").unlink(missing_ok=True)
    task = {"times": str(folder / "times"), "seconds": 0}
    # DeepSpeed finds there what it has compiled before; its home is a new one.
    compiled = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    variables = {"WANDB_PROJECT": folder.name, "XDG_CACHE_HOME": compiled}
    given = {"builder": TASK, "task": task, "variables": variables, **ARGUMENTS, **shared}
    return Training(folder, server, command=command, **given)


def tracked(ended: Training, server: WandbServer) -> Tracked:
    run = server.run(ended.run_id)
    artifacts = [found for found in committed(server) if found.logged_by == run.id]
    seen = wandb_seen.online(server, ended.output_dir, ended.run_id, was_killed=True)
    return Tracked(seen, run, artifacts, ended)


def kill_behind_a_checkpoint(attempt: Training) -> None:
    """SIGKILL to all processes of the launch, wandb's too."""
    while not (attempt.output_dir / f"checkpoint-{SAVES}").is_dir():
        attempt.reach(len(attempt.began_steps) + 1)
    attempt.reach(len(attempt.began_steps) + 3)
    launched = psutil.Process(attempt.process.pid)
    for process in [launched, *launched.children(recursive=True)]:
        process.kill()
    attempt.process.wait()
    assert len(attempt.began_steps) < 100, "it was killed in the middle"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def alone(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """One process that nothing happened to."""
    return tracked(training(tmp_path_factory.mktemp("alone") / "alone", server, None).ended(), server)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(DDP, marks=pytest.mark.slow, id="ddp"),
        *(
            pytest.param(
                ROOT / "launch_configs" / f"{name}.yaml",
                id=name,
                marks=[
                    pytest.mark.deepspeed,
                    pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed"),
                ],
            )
            for name in ("zero2", "zero3")
        ),
    ],
)
def test_a_killed_launch_leaves_in_wandb_what_one_process_leaves(
    config: Path, alone: Tracked, server: WandbServer, tmp_path: Path
) -> None:
    folder = tmp_path / config.stem
    kill_behind_a_checkpoint(training(folder, server, config))
    found = tracked(training(folder, server, config).ended(), server)
    assert f"Going on from {found.training.output_dir}/checkpoint-{SAVES}" in found.training.out
    assert json.loads((found.training.output_dir / "wandb_run.json").read_text())["run_id"] == found.run.id
    assert f"{len(alone.run.rows)} rows, all confirmed by the server" in found.training.report
    assert_same_run(found, alone)
    assert_same_rows(found, alone)
    assert_same_artifacts(found, alone)
    assert server.unknown() == []


def assert_same_run(found: Tracked, alone: Tracked) -> None:
    ours, theirs = found.seen, alone.seen
    assert ours.about == theirs.about
    assert ours.about["state"] == "finished"
    assert ours.axes == theirs.axes
    assert ours.files == theirs.files
    assert set(ours.config) == set(theirs.config)
    differing = {name for name in theirs.config if ours.config[name] != theirs.config[name]}
    assert differing <= OF_THE_LAUNCH, differing
    assert ours.config["harness"]["software"] == theirs.config["harness"]["software"]
    assert ours.config["harness"]["launch"]["WORLD_SIZE"] == "2"
    assert close(results(ours.card), results(theirs.card)), ours.card


def assert_same_rows(found: Tracked, alone: Tracked) -> None:
    assert [set(row) for row in found.seen.rows] == [set(row) for row in alone.seen.rows], "in this order"
    last_rows = {"summary": (found.seen.summary, alone.seen.summary)}
    numbered = {str(i): rows for i, rows in enumerate(zip(found.seen.rows, alone.seen.rows, strict=True))}
    tables, histograms = 0, 0
    for number, (ours, theirs) in (last_rows | numbered).items():
        for name, value in theirs.items():
            kind = value.get("_type") if isinstance(value, dict) else None
            if kind == "table-file":
                tables += 1
                assert close(table(found.run, ours[name]), table(alone.run, value), rel=1e-3), (number, name)
            elif kind == "graph-file":
                assert graph(found.run, ours[name]) == graph(alone.run, value)
            elif kind == "histogram":
                histograms += 1
                assert same_histogram(ours[name], value), (number, name)
            else:
                assert close(ours[name], value), (number, name, ours[name], value)
    assert (tables, histograms > 40) == (3, True)  # one of the tables is the summary's


def assert_same_artifacts(found: Tracked, alone: Tracked) -> None:
    assert set(found.seen.collections) == set(alone.seen.collections)
    for collection, expected in alone.seen.collections.items():
        versions = found.seen.collections[collection]
        assert [version.type for version in versions] == [version.type for version in expected], collection
        assert [version.aliases for version in versions] == [version.aliases for version in expected], collection
        for ours, theirs in zip(versions, expected, strict=True):
            assert close(without(ours.metadata, *OF_THE_RUN), without(theirs.metadata, *OF_THE_RUN))
            assert ours.metadata.get("run_id") == (found.run.id if theirs.metadata.get("run_id") else None)
            assert shared(ours.files) == shared(theirs.files)
            if "trainer_state.json" in theirs.files:
                # The number of samples a device takes is in it.
                states = [without(each.files["trainer_state.json"], "train_batch_size") for each in (ours, theirs)]
                assert close(*states)
                assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(ours.files)
                sharded = [name for name in ours.files if name.endswith("optim_states.pt")]
                assert "optimizer.pt" in ours.files or len(sharded) == 2
    weights = [
        [
            load_file(artifact.contents["model.safetensors"])
            for artifact in each
            if "model.safetensors" in artifact.files
        ]
        for each in (found.artifacts, alone.artifacts)
    ]
    for ours, theirs in zip(*weights, strict=True):
        assert {name: value.shape for name, value in ours.items()} == {n: value.shape for n, value in theirs.items()}
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4) for name in theirs)
    assert len(weights[0]) == 4, "three checkpoints and the final model"


def close(found: Any, expected: Any, *, rel: float = 1e-4) -> bool:
    """Whether two values of JSON are the same but for rounding."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return set(found) == set(expected) and all(close(found[n], expected[n], rel=rel) for n in expected)
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(close(*pair, rel=rel) for pair in zip(found, expected, strict=True))
    if isinstance(expected, float) or isinstance(found, float):
        return math.isclose(found, expected, rel_tol=rel, abs_tol=1e-6)
    return bool(found == expected)


def same_histogram(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Its edges, and its counts but for what rounding moves over an edge."""
    moved = sum(abs(a - b) for a, b in zip(found["values"], expected["values"], strict=True)) / 2
    edges = all(
        math.isclose(*pair, rel_tol=1e-3, abs_tol=1e-5) for pair in zip(found["bins"], expected["bins"], strict=True)
    )
    return edges and sum(found["values"]) == sum(expected["values"]) and moved <= 0.02 * sum(expected["values"]) + 1


def graph(run: RunRecord, entry: dict[str, Any]) -> Any:
    """The layers, and the sizes of what comes out of each, as if all samples of a step were one batch."""
    nodes = json.loads(run.files[entry["path"]].read_text(encoding="utf-8"))["nodes"]
    shapes = [str(node["output_shape"]).replace("[2, ", "[4, ") for node in nodes]
    return [without(node, "id", "output_shape") for node in nodes], shapes


def table(run: RunRecord, entry: dict[str, Any]) -> Any:
    content = json.loads(run.files[entry["path"]].read_text(encoding="utf-8"))
    return {"columns": content["columns"], "data": content["data"]}


def results(card: str) -> list[list[Any]]:
    """The table of evaluations in a model card."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
    return [lines[0], *([float(cell) for cell in line] for line in lines[2:])]


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def shared(files: Collection[str]) -> set[str]:
    """Those that do not say how many processes wrote them."""
    return {
        name for name in files if not name.startswith(("rng_state", "optimizer", "global_step")) and name != "latest"
    }
