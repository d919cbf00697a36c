"""Data is prepared once, whoever comes first, and whatever happens to it; two nodes are two launchers here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import ROOT, SCRIPT, Ended, flags, free_port, run
from tests.support.preparing import SECONDS

pytestmark = pytest.mark.slow

ROWS = 5_500
BATCHES = 6  # of a thousand rows, the last of what is left


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_who_is_killed_while_it_prepares_leaves_no_half_to_those_who_wait(tmp_path: Path) -> None:
    file, cache, calls = tmp_path / "rows.jsonl", tmp_path / "cache", tmp_path / "calls"
    file.write_text("".join(f'{{"number": {i}}}\n' for i in range(ROWS)), encoding="utf-8")
    command = [sys.executable, "-m", "tests.support.preparing", str(file), str(cache), str(calls)]
    begun: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        begun.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return begun[-1]

    def called() -> list[str]:
        return calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []

    try:
        reading = begin()
        wait_for(lambda: list(cache.rglob("*.partial")))
        reading.kill()
        assert reading.wait() != 0, "it was killed while it read the file"
        several = [begin() for _ in range(3)]
        wait_for(lambda: len(called()) == 3)
        (preparing,) = [process for process in several if str(process.pid) == called()[-1]]
        time.sleep(SECONDS / 2)
        assert set(called()) == {str(preparing.pid)}, "the others wait"
        preparing.kill()
        assert preparing.wait() != 0
        assert list(cache.rglob("tmp*")), "it had written a part"
        assert not list(cache.rglob("cache-*.arrow"))
        others = [process for process in several if process is not preparing]
        expected = f"{sum(range(1, ROWS + 1))} {ROWS}\n"
        assert [each.communicate(timeout=60)[0] for each in others] == [expected, expected]
        assert len(called()) == 3 + BATCHES, "one of them prepared the data, the other found it"
    finally:
        for process in begun:
            process.kill()
            process.communicate()


def on_two_nodes(folder: Path, **task: Any) -> list[Ended]:
    """A launcher for each node, one process each; they share the disk."""
    port = free_port()
    given = {"task": "tests.support.tasks.preparing_task:build", "task_args": {"folder": str(folder), **task}}
    arguments = flags(folder / "out", {**given, "max_steps": 1, "save_strategy": "no", "preprocess_on_main": True})
    launchers = [
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1"),
            *("--master_addr=127.0.0.1", f"--master_port={port}", SCRIPT, *arguments, "--expect_num_processes=2"),
        ]
        for node in (0, 1)
    ]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, launchers))


def test_on_main_rank_zero_of_all_nodes_prepares_before_the_others(tmp_path: Path) -> None:
    ended = on_two_nodes(tmp_path)
    assert [each.code for each in ended] == [0, 0], ended
    times = [json.loads(f"[{(tmp_path / f'rank-{rank}').read_text().replace(' ', ',')}]") for rank in (0, 1)]
    assert times[0][1] < times[1][0], "rank zero had ended"


def test_a_node_that_can_not_prepare_ends_all_with_what_it_says(tmp_path: Path) -> None:
    began = time.monotonic()
    zero, one = on_two_nodes(tmp_path, raises=True)
    assert 0 not in (zero.code, one.code)
    assert time.monotonic() - began < 90, "nobody waits for a collective to time out"
    assert not (tmp_path / "out").exists()
    assert "preparing_task.py" in one.err, "the traceback of the rank that failed"
    assert "RuntimeError: this node has no such file" in one.err
    assert "Another rank has failed: this node has no such file" in zero.err
    assert "preparing_task.py" not in zero.err
