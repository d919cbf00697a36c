"""A process knows the agent that it descends from, and its death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.agent.processes import is_agent
from tests.support.launching import ROOT

AGENT = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[2]]).returncode)
"""
CHILD = """
import os, sys, time
from harness.agent.processes import between_agent_and_us, is_orphan
above = between_agent_and_us()
print(len(above), os.getppid() in above, is_orphan(), flush=True)
while not is_orphan():
    time.sleep(0.02)
print("orphan", flush=True)
"""
LAUNCHER = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {CHILD!r}]).returncode)"


@pytest.mark.parametrize(("child", "between"), [(CHILD, 1), (LAUNCHER, 2)], ids=["alone", "under a launcher"])
def test_the_death_of_the_agent_is_seen(child: str, between: int, tmp_path: Path) -> None:
    """Also by a process that is not its child."""
    (tmp_path / "wandb").write_text(AGENT)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    agent = subprocess.Popen(
        [sys.executable, str(tmp_path / "wandb"), "agent", child], env=env, stdout=subprocess.PIPE, text=True
    )
    assert agent.stdout
    with agent.stdout as said:
        assert said.readline().split() == [str(between), "True", "False"]
        time.sleep(0.1)
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        assert said.readline() == "orphan\n"


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        ("/venv/bin/python3 /venv/bin/wandb agent me/p/s", True),
        ("python -m wandb agent --count 1 s", True),
        ("python -u -m wandb agent s", True),
        ("wandb agent s", True),
        ("python -m wandb sync agent", False),
        ("wandb launch-agent", False),
        ("wandb", False),
        ("", False),
    ],
)
def test_an_agent_is_known_by_its_command_line(command: str, is_one: bool) -> None:
    assert is_agent(command.split()) == is_one
