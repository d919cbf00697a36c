"""A task's functions over twenty SIGKILLs at random places: each value once, and that of a run that was left alone."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty_training import Training
from tests.support.parity import TIMING, history
from tests.support.two_processes import rows
from tests.support.wandb_server import WandbServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS, MAX_STEPS, SEED = 20, 150, 16
# An attempt dies while it starts, or after one of its first steps.
STARTS, START_SECONDS, MOST_STEPS, PACE = 0.2, 3.0, 9, 0.05
HOOKS = {"after_step": "third", "after_evaluation": "perplexity", "build_optimizer": "groups", "logged": ["penalty"]}
ARGUMENTS: dict[str, Any] = {
    "max_steps": MAX_STEPS,
    "logging_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 10,
    "save_steps": 5,
    "save_total_limit": 2,
    "wandb_log_model": "false",
    "resume_from_checkpoint": "auto",
    "generate_steps": 25,
    "generate_prompts": "weights",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    started = WandbServer(tmp_path_factory.mktemp("server"))
    started.start()
    yield started
    started.stop()


def begun(folder: Path, server: WandbServer) -> Training:
    builder = "tests.support.tasks.hooked_task:build"
    return Training(folder, server, pace=PACE, builder=builder, task=HOOKS, **ARGUMENTS)


def kill(training: Training, rng: random.Random, *, before: int) -> int:
    """Wait for a random place, then kill the script, or its whole session; returns how many steps had begun."""
    if rng.random() < STARTS:
        time.sleep(rng.uniform(0, START_SECONDS))
    else:
        training.reach(before + rng.randint(1, MOST_STEPS))
        time.sleep(rng.uniform(0, 2 * PACE))
    assert training.process.poll() is None, training.err[-3000:]
    if rng.random() < 0.5:
        training.process.kill()
    else:
        os.killpg(training.process.pid, signal.SIGKILL)
    assert training.process.wait(30) == -signal.SIGKILL
    return len(training.began_steps)


def in_wandb(server: WandbServer, run_id: str) -> list[dict[str, Any]]:
    """The rows of a run without the clock's values; of a table its content, for it is found by random names."""
    (found,) = [run for run in server.runs() if run.id == run_id]
    left_out = re.compile(rf"^(_timestamp|_runtime)$|{TIMING.pattern}")
    return [{name: content(value) for name, value in row.items() if not left_out.search(name)} for row in found.rows]


def content(value: Any) -> Any:
    return value["sha256"] if isinstance(value, dict) and "sha256" in value else value


def test_each_value_is_there_once_and_is_that_of_a_run_that_was_left_alone(server: WandbServer, tmp_path: Path) -> None:
    whole = begun(tmp_path / "whole", server).ended()
    rng, steps = random.Random(SEED), 0
    for _ in range(KILLS):
        steps = kill(begun(tmp_path / "killed", server), rng, before=steps)
    killed = begun(tmp_path / "killed", server).ended()
    assert "Going on from " in killed.out
    assert len(killed.began_steps) > len(whole.began_steps), "no step was made twice"
    expected = history(whole.output_dir)
    assert [event["of_step"] for event in expected if "of_step" in event] == [*range(3, MAX_STEPS + 1, 3)]
    assert sum("eval_perplexity" in event for event in expected) == MAX_STEPS // 10
    assert sum("penalty" in event for event in expected) == MAX_STEPS // 4
    assert history(killed.output_dir) == expected
    assert rows(killed.output_dir) == rows(whole.output_dir)
    assert in_wandb(server, "killed") == in_wandb(server, "whole")
    texts = [line["generated_texts"]["data"] for line in rows(killed.output_dir) if "generated_texts" in line]
    assert [step for ((step, _, _),) in texts] == [*range(25, MAX_STEPS + 1, 25)]
    assert sum("generated_texts._type" in row or "generated_texts" in row for row in in_wandb(server, "killed")) == len(
        texts
    )
    assert len(in_wandb(server, "killed")) == len(expected) + len(texts)
    ours, theirs = ((each.output_dir / "model.safetensors").read_bytes() for each in (killed, whole))
    assert ours == theirs
