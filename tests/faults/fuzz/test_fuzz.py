"""Some cases of the fuzzer of what a resume reads; `python -m tests.faults.fuzz` plays more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it forks a process that has torch loaded")
def test_damage_to_a_checkpoint_ends_with_the_same_numbers_or_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.fuzz", "--cases", "60", "--seed", "2"]
    ended = subprocess.run([*command, "--folder", str(tmp_path / "cases")], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " 60 " in ended.stdout
