"""Forked processes behave as those that Python starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.forking import fork
from tests.support.launching import DDP, Ended, finish, launcher

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they are started as usual")
TOLD = """
import json, os, sys
print(json.dumps([__name__, sys.argv, os.getcwd(), os.environ.get("GIVEN"), "HF_HOME" in os.environ, sys.stdin.read()]))
print([name for name in sys.modules if name.split(".")[0] in ("harness", "tests")], file=sys.stderr)
"""


def both(folder: Path, *argv: str, **variables: str) -> list[Ended]:
    command = [sys.executable, *argv]
    return [
        finish(command, folder, {"PATH": os.environ["PATH"], **variables}, forked=forked) for forked in (True, False)
    ]


@pytest.mark.parametrize("argv", [["-c", TOLD, "a"], ["told.py", "a"], ["-m", "told", "a"], ["-u", "told.py"]])
def test_arguments_folder_variables_and_modules_are_the_same(argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(TOLD, encoding="utf-8")
    forked, started = both(tmp_path, *argv, GIVEN="this")
    assert forked == started
    assert forked.code == 0


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("raise SystemExit(85)", 85),
        ("raise ValueError('this')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15),
        ("import atexit; atexit.register(print, 'last')", 0),
    ],
)
def test_ends_are_the_same(script: str, code: int, tmp_path: Path) -> None:
    forked, started = both(tmp_path, "-c", script)
    assert forked.code == started.code == code
    assert forked.out == started.out
    assert forked.err.splitlines()[-1:] == started.err.splitlines()[-1:]


def test_each_draws_numbers_of_its_own(tmp_path: Path) -> None:
    script = "import random, numpy, torch; print(random.random(), numpy.random.rand()); print(torch.rand(1))"
    first, second = (finish([sys.executable, "-c", script], tmp_path, os.environ).out.splitlines() for _ in range(2))
    assert first[0] != second[0]
    assert first[1] == second[1], "torch's are the same in each process"


def test_who_asked_can_signal_it_and_one_that_nobody_waits_for_is_killed(tmp_path: Path) -> None:
    script = (
        "import signal, sys, time; signal.signal(10, lambda *_: sys.exit(3)); print(1, flush=True); time.sleep(100)"
    )
    with (tmp_path / "out").open("w") as out:
        process, other = (fork(["-c", script], env=os.environ, cwd=tmp_path, out=out, err=out) for _ in range(2))
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        while (tmp_path / "out").read_text() != "1\n1\n":
            time.sleep(0.01)
        assert process.poll() is None
        assert os.getpgid(process.pid) == process.pid
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 3
        found = psutil.Process(other.pid)
        del other
        found.wait(30)


RANK = """
import os, signal, sys, time
import torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
os.write(1, f"{rank} {dist.get_world_size()} {os.getppid()}\\n".encode())  # at once: both ranks write to one pipe
dist.barrier()
if rank == 1:
    sys.exit(7)
time.sleep(100)
"""


def test_ranks_of_a_launcher_are_forked_and_it_ends_those_that_are_left(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    began = time.monotonic()
    ended = finish([*launcher(DDP), "rank.py"], tmp_path, os.environ)
    assert time.monotonic() - began < 60
    assert ended.code == 1
    told = sorted(line.split() for line in ended.out.splitlines())
    assert [line[:2] for line in told] == [["0", "2"], ["1", "2"]]
    assert "exitcode  : 7 " in ended.err
