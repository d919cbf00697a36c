"""The tracker without our loop, and the W&B guide's way to resume: with what the README shows, on a server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launching import Ended, run
from tests.support.pages import TRACKING, blocks
from tests.support.parity import TIMING, TRAINING, as_flags, assert_equal_runs
from tests.support.wandb_server import WandbServer

ROOT = Path(__file__).parents[2]
CLOCK = re.compile(rf"^_|{TIMING.pattern}")
TASK = "tests.support.tasks.parity_task:build"
BY_HAND = next(block for block in blocks("python", TRACKING) if "log_checkpoint" in block)
RESUME = next(block for block in blocks("python", TRACKING) if 'resume="must"' in block)
# Waits where it is going to be killed: after its second checkpoint.
TO_BE_KILLED = """
import runpy, time
from harness.tracking import WandbTracker
log_checkpoint = WandbTracker.log_checkpoint
def log_and_wait(self, folder, *, step, **more):
    log_checkpoint(self, folder, step=step, **more)
    while step == 16:
        time.sleep(1)
WandbTracker.log_checkpoint = log_and_wait
runpy.run_path("by_hand.py", run_name="__main__")
"""
RESUMED = f"""
import runpy, sys
last_run_id = "own"
{RESUME}
sys.argv = ["by_hand.py", folder]
runpy.run_path("by_hand.py", run_name="__main__")
assert wandb.run is run  # adopted, and left to its owner
run.finish()
"""
# As in the W&B guide: the checkpoint is loaded as a model too.
GUIDE = """
import os, sys, wandb
from transformers import AutoModelForCausalLM
from harness.train import main

last_run_id = "guide"
with wandb.init(project=os.environ["WANDB_PROJECT"], id=last_run_id, resume="must") as run:
    my_checkpoint_name = f"checkpoint-{last_run_id}:latest"
    my_checkpoint_artifact = run.use_artifact(my_checkpoint_name)
    checkpoint_dir = my_checkpoint_artifact.download()
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir)
    assert model.num_parameters() > 0
    code = main([*sys.argv[1:], "--resume_from_checkpoint", checkpoint_dir])
sys.exit(code)
"""


def values(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not CLOCK.search(name)} for row in rows]


def wait_for(what: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.2)


def by_hand(folder: Path, script: str, server: WandbServer, run_id: str) -> Ended:
    folder.mkdir(exist_ok=True)
    (folder / "by_hand.py").write_text(BY_HAND, encoding="utf-8")
    variables = {**server.environment(), "WANDB_RUN_ID": run_id, "WANDB_SILENT": "true", "WANDB_DIR": str(folder)}
    return run([sys.executable, "-c", script], cwd=folder, ACCELERATE_USE_CPU="true", **variables)


def test_the_example_is_the_thirty_lines_that_are_promised() -> None:
    lines = BY_HAND[BY_HAND.index("tracker = ") :].splitlines()
    calls = [line for line in lines if re.search(r"\btracker\.\w", line)]
    assert len(calls) == 4
    assert len(lines) <= 40


@pytest.mark.slow
def test_a_loop_of_ones_own_has_rows_histograms_checkpoints_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    with WandbServer(tmp_path / "server") as server:
        whole = by_hand(tmp_path / "whole", 'import runpy; runpy.run_path("by_hand.py")', server, "whole")
        assert whole.code == 0, whole.err

        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "by_hand.py").write_text(BY_HAND, encoding="utf-8")
        process = launched(TO_BE_KILLED, tmp_path / "own", server)
        try:
            wait_for(lambda: len(committed(server)) == 2 and len(server.run("own").rows) == 16)
        finally:
            process.kill()
            process.wait()
        resumed = by_hand(tmp_path / "elsewhere", RESUMED, server, "own")
        assert resumed.code == 0, resumed.err

        expected, found = server.run("whole"), server.run("own")
        assert values(found.rows) == values(expected.rows)
        assert len(found.rows) == 32
        assert {name for name in found.rows[3] if "/" in name} >= {
            "train/loss",
            "train/epoch",
            "train/global_step",
            *(f"{kind}/{name}" for kind in ("gradients", "parameters") for name in ("0.weight", "0.bias", "2.weight")),
        }
        assert "gradients/0.weight" not in found.rows[2]
        assert (found.state, found.exit_code, found.name) == ("finished", 0, "by-hand")
        assert found.config["lr"] == 0.01
        # One collection for both runs: they have the same name.
        of_run = [each for each in server.artifacts("checkpoint-by-hand") if each.metadata["run_id"] == "own"]
        for epoch, each in zip((1, 2, 3, 4), of_run, strict=True):
            assert {f"epoch_{epoch}", f"checkpoint_global_step_{8 * epoch}"} <= {*each.aliases}
            assert {"model.safetensors", "step.txt"} <= set(each.files)
        assert "latest" in of_run[-1].aliases
        assert server.unknown() == []
    one, other = (load_file(tmp_path / name / "by-hand" / "model.safetensors") for name in ("whole", "elsewhere"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def committed(server: WandbServer) -> list[Any]:
    found = server.artifacts("checkpoint-by-hand")
    return [each for each in found if each.metadata["run_id"] == "own" and each.state == "COMMITTED"]


def launched(script: str, folder: Path, server: WandbServer) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_MODE")}
    environment |= {**server.environment(), "WANDB_RUN_ID": "own", "WANDB_DIR": str(folder)}
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", script], cwd=folder, env=environment)


@pytest.mark.slow
def test_the_guides_resume_snippet_goes_on_with_what_was_logged(tmp_path: Path) -> None:
    arguments = {**TRAINING, "task": TASK, "save_strategy": "steps", "save_steps": 10, "report_to": "wandb"}
    with WandbServer(tmp_path / "server") as server:
        variables = {
            **server.environment(),
            "WANDB_LOG_MODEL": "checkpoint",
            "WANDB_PROJECT": "guided",
            "WANDB_DIR": str(tmp_path),
            "WANDB_SILENT": "true",
        }
        command = [sys.executable, str(ROOT / "harness" / "train.py")]
        whole = run([*command, *as_flags({**arguments, "output_dir": tmp_path / "whole"})], **variables)
        assert whole.code == 0, whole.err[-2000:]
        # It ends early, as at a time limit; the schedule is that of the whole.
        first = {**arguments, "output_dir": tmp_path / "first", "task": "tests.support.tasks.stopping_task:build"}
        stopping = {"task_args": {"after": 180, "sent": str(tmp_path / "sent")}}
        ended = run([*command, *as_flags({**first, **stopping})], WANDB_RUN_ID="guide", **variables)
        assert ended.code == 85, ended.err[-2000:]

        # The task that stopped was another one by name.
        again = as_flags({**arguments, "output_dir": tmp_path / "again", "allow_changed_arguments": True})
        resumed = run([sys.executable, "-c", GUIDE, *again], cwd=tmp_path, **variables)
        assert resumed.code == 0, resumed.err[-2000:]
        assert_equal_runs(tmp_path / "whole", tmp_path / "again")
        (expected, found) = (run_of(server, "whole"), server.run("guide"))
        assert values(found.rows) == values(expected.rows)
        assert found.state == "finished"
        used = [each for each in server.artifacts("checkpoint-guide") if "guide" in each.used_by]
        assert len(used) == 1


def run_of(server: WandbServer, name: str) -> Any:
    (found,) = [each for each in server.runs() if each.config["output_dir"].endswith(name)]
    return found
