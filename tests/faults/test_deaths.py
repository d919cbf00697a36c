"""The deaths do what they say: processes end, unsynced files are cut, a disk is full and free again."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults import deaths
from tests.faults.attempt import CONTAINER, Attempt, end_processes_of, processes_of
from tests.faults.plan import configurations, draw_case
from tests.faults.task import set_clock, tell_what_is_synced

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the laboratory reads /proc")

CHILD = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
"""


def started(folder: Path, code: str) -> Attempt:
    return Attempt.start([sys.executable, "-c", code], dict(os.environ), folder, folder / "run", 1)


def test_a_process_whose_parent_is_gone_is_ended_too(tmp_path: Path) -> None:
    attempt = started(tmp_path, CHILD)
    assert attempt.end() == 0
    (child,) = processes_of(tmp_path)
    assert child != attempt.process.pid
    assert processes_of(tmp_path.parent) == [child], "below a folder of cases"
    assert processes_of(tmp_path / "other") == []
    end_processes_of(tmp_path)
    assert not [number for number in processes_of(tmp_path) if number == child]


def test_an_attempt_is_awaited_until_it_ends(tmp_path: Path) -> None:
    attempt = started(tmp_path, "import time; time.sleep(0.3); raise SystemExit(7)")
    assert not attempt.wait_for(lambda: False)
    assert attempt.end() == 7
    assert not attempt.sleep(5.0)


def test_a_power_cut_spares_what_was_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", os.fsync)
    tell_what_is_synced(tmp_path / "synced")
    run = tmp_path / "run"
    run.mkdir()
    for i in range(20):
        for kind in ("synced", "later", "never"):
            path = run / f"{kind}-{i}.bin"
            path.write_bytes(b"1" * 1000)
            if kind != "never":
                with path.open("rb") as file:
                    os.fsync(file.fileno())
    with (run / "rows.jsonl").open("ab", buffering=0) as file:
        file.write(b"1" * 500)
        os.fsync(file)
        time.sleep(0.02)
        file.write(b"1" * 500)
    for path in run.glob("synced-*"):
        path.rename(path.with_suffix(".renamed"))
    for path in run.glob("later-*"):
        path.write_bytes(b"2" * 1000)
    attempt = Attempt(tmp_path, run, None, 1, 0, 0.0)  # type: ignore[arg-type]
    for seed in range(10):  # the rows are cut in some of them
        deaths.lose_what_is_not_synced(attempt, random.Random(seed))
    assert all(path.read_bytes() == b"1" * 1000 for path in run.glob("*.renamed"))
    for kind, digit in (("later", b"2"), ("never", b"1")):
        files = [path.read_bytes() for path in run.glob(f"{kind}-*")]
        assert len(files) == 20
        assert sum(content != digit * 1000 for content in files) > 15
    rows = (run / "rows.jsonl").read_bytes()
    assert rows[:500] == b"1" * 500
    assert rows != b"1" * 1000


def test_a_disk_is_full_and_has_room_again(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a small file system can't be mounted here")
    disk = tmp_path / "disk"
    with deaths.small_disk(disk, "1m"):
        run = disk / "run"
        run.mkdir()
        deaths.fill(disk, left_bytes=0)
        with pytest.raises(OSError, match="No space left"):
            (run / "file").write_bytes(bytes(1000))
        attempt = Attempt(tmp_path, run, None, 1, 0, 0.0)  # type: ignore[arg-type]
        deaths.mend(attempt)
        (run / "file").write_bytes(bytes(1000))
        subprocess.run(["chattr", "+i", str(run)], check=True)
        with pytest.raises(PermissionError):
            (run / "another").write_bytes(b"")
        deaths.mend(attempt)
        (run / "another").write_bytes(b"")
    assert not any(disk.iterdir())


def test_what_was_left_mounted_and_running_is_swept_away(tmp_path: Path) -> None:
    case = tmp_path / "case"
    case.mkdir()
    attempt = started(case, "import time; time.sleep(60)")
    if os.geteuid() == 0:
        deaths.small_disk(case / "disk", "1m").__enter__()
    deaths.sweep(tmp_path)
    assert attempt.process.wait(5) == -9
    assert not (case / "disk").is_mount()


def test_a_case_is_the_same_for_the_same_seed_and_all_is_drawn() -> None:
    among = configurations(processes=None, tracking=None, trainer=False)
    cases = [draw_case(1, index, among) for index in range(400)]
    assert cases == [draw_case(1, index, among) for index in range(400)]
    assert cases[3].kills != draw_case(2, 3, among).kills
    assert {kill.kind for case in cases for kill in case.kills} == set(deaths.DEATHS)
    moments = {kill.moment for case in cases for kill in case.kills}
    assert moments == {"step", "save", "commit", "evaluation", "startup", "opening", "closing", "upload"}
    assert all(kill.moment != "closing" for case in cases for kill in case.kills[:-1])
    assert {case.configuration.extends for case in cases} == {True, False}
    for number in (sum(case.in_containers for case in cases), sum(case.is_renamed for case in cases)):
        assert 20 < number < 200


LISTENER = """
import os, signal, time
for each in (signal.SIGINT, signal.SIGHUP):
    signal.signal(each, lambda number, _: print(signal.Signals(number).name, flush=True))
print("ready", os.getpid(), flush=True)
while True:
    time.sleep(0.05)
"""


def heard(attempt: Attempt) -> list[str]:
    return attempt.text("out").split()


@pytest.mark.parametrize("inside", [(), CONTAINER])
def test_what_a_terminal_sends_reaches_the_script_in_a_container_too(inside: tuple[str, ...], tmp_path: Path) -> None:
    if inside and os.geteuid() != 0:
        pytest.skip("a namespace of process numbers can't be made here")
    command = [*inside, sys.executable, "-c", LISTENER]
    attempt = Attempt.start(command, dict(os.environ), tmp_path, tmp_path / "run", 1, is_read=True)
    try:
        assert attempt.wait_for(lambda: len(heard(attempt)) == 2, 20)
        assert (heard(attempt)[1] == str(attempt.script)) == (not inside)
        assert attempt.ranks() == [attempt.script]
        for death, name in ((deaths.DEATHS["interrupt"], "SIGINT"), (deaths.DEATHS["hangup"], "SIGHUP")):
            death(random.Random(1), attempt)
            assert attempt.wait_for(lambda name=name: heard(attempt)[-1] == name, 20)
        before = len(heard(attempt))
        assert attempt.reader
        attempt.reader.kill()
        attempt.reader.wait()
        deaths.DEATHS["interrupt"](random.Random(1), attempt)
        assert attempt.process.wait(20) != 0, "a closed pipe ends who prints into it"
        assert len(heard(attempt)) == before
    finally:
        end_processes_of(tmp_path)
        attempt.process.wait(20)


def test_a_clock_that_is_set_is_that_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", time.time)
    monkeypatch.setattr(psutil._psplatform, "boot_time", psutil._psplatform.boot_time)
    true, created_at = time.time(), psutil.Process().create_time()
    set_clock(tmp_path / "clock")
    assert abs(time.time() - true) < 60
    (tmp_path / "clock").write_text("86400.0")
    for _ in range(2):
        set_clock(tmp_path / "clock")
        assert 86400 <= time.time() - true < 86500
        assert 86399 <= psutil.Process().create_time() - created_at < 86402
