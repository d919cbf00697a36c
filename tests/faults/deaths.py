"""The ways in which attempts are killed, and the repairs before the next attempt."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.attempt import Attempt, committed_steps, end_processes_of, send
from tests.faults.plan import CLOCK_FILE, Kill

FILLER = "filler"
LEFT_TO_ITSELF = "left to itself"
# Linux writes back what is older than this by itself.
WRITTEN_BACK_SECONDS = 30.0
RANK_SILENCE_SECONDS = 45.0
NOTICE_SECONDS = 10.0


def strike(kill: Kill, attempt: Attempt) -> str:
    """Kill the attempt in that way and wait for its end; returns what was done. Raises HungError if it does not end."""
    rng = random.Random(kill.seed)
    return DEATHS[kill.kind](rng, attempt)


def _kill_all(rng: random.Random, attempt: Attempt) -> str:
    end_processes_of(attempt.folder)
    return "SIGKILL to all"


def _kill_rank(rng: random.Random, attempt: Attempt) -> str:
    ranks = attempt.ranks()
    if not ranks:
        return _kill_all(rng, attempt)
    rank = rng.randrange(len(ranks))
    send([ranks[rank]], signal.SIGKILL)
    return f"SIGKILL to rank {rank}"


def _term(rng: random.Random, attempt: Attempt) -> str:
    send([attempt.script], signal.SIGTERM)
    return "SIGTERM"


def _usr1(rng: random.Random, attempt: Attempt) -> str:
    # A launcher has no handler: whoever sends the signal to it means to kill.
    send(attempt.ranks() or [attempt.script], signal.SIGUSR1)
    return "SIGUSR1"


def _interrupt(rng: random.Random, attempt: Attempt) -> str:
    send(attempt.reached_by_terminal(), signal.SIGINT)
    return "Ctrl-C"


def _interrupt_twice(rng: random.Random, attempt: Attempt) -> str:
    seconds = rng.uniform(0.05, 1.5)
    _interrupt(rng, attempt)
    if attempt.sleep(seconds):
        _interrupt(rng, attempt)
    return f"Ctrl-C, and again after {seconds:.1f} s"


def _hangup(rng: random.Random, attempt: Attempt) -> str:
    send(attempt.reached_by_terminal(), signal.SIGHUP)
    return "SIGHUP"


def _closed_stdout(rng: random.Random, attempt: Attempt) -> str:
    assert attempt.reader is not None
    attempt.reader.kill()
    return f"nobody reads its output, {_left_to_itself(rng, attempt)}"


def _clock(rng: random.Random, attempt: Attempt) -> str:
    """
    The clock is set.

    For the training only, which takes it from a file, as this machine has others on it; and for what the lock says.
    """
    seconds = rng.choice([-1, 1]) * rng.choice([3.0, 60.0, 86400.0])
    (attempt.folder / CLOCK_FILE).write_text(str(seconds), encoding="utf-8")
    done = _left_to_itself(rng, attempt)
    lock = attempt.output_dir / "harness.lock"
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(lock.read_text(encoding="utf-8"))
        changed_at = lock.stat().st_mtime + seconds
        lock.write_text(json.dumps(holder | {"taken_at": holder["taken_at"] + seconds}), encoding="utf-8")
        os.utime(lock, (changed_at, changed_at))
    return f"clock set by {seconds:+g} s, {done}"


def _stop(rng: random.Random, attempt: Attempt) -> str:
    seconds = rng.uniform(0.3, 3.0)
    send(attempt.everybody(), signal.SIGSTOP)
    time.sleep(seconds)
    end_processes_of(attempt.folder)
    return f"SIGSTOP, SIGKILL after {seconds:.1f} s"


def _stop_rank(rng: random.Random, attempt: Attempt) -> str:
    ranks = attempt.ranks()
    if len(ranks) < 2:
        return _kill_all(rng, attempt)
    rank = rng.randrange(len(ranks))
    send([ranks[rank]], signal.SIGSTOP)
    other = ranks[1 - rank]
    began = time.monotonic()
    while time.monotonic() < began + RANK_SILENCE_SECONDS and other in attempt.ranks():
        time.sleep(0.1)
    took = time.monotonic() - began
    gave_up = other not in attempt.ranks()
    end_processes_of(attempt.folder)
    return f"SIGSTOP to rank {rank}, the other {'gave up' if gave_up else 'still waited'} after {took:.0f} s, SIGKILL"


def _read_only(rng: random.Random, attempt: Attempt) -> str:
    if not attempt.output_dir.is_dir():
        return _kill_all(rng, attempt)
    subprocess.run(["chattr", "+i", str(attempt.output_dir)], check=True)
    return f"read-only folder, {_left_to_itself(rng, attempt)}"


def _disk_full(rng: random.Random, attempt: Attempt) -> str:
    left = rng.choice([0, rng.randrange(600_000)])
    fill(attempt.output_dir.parent, left_bytes=left)
    return f"disk full but for {left} bytes, {_left_to_itself(rng, attempt)}"


def _left_to_itself(rng: random.Random, attempt: Attempt) -> str:
    """To its end, or killed somewhat later."""
    if rng.random() < 0.5:
        with contextlib.suppress(subprocess.TimeoutExpired):
            attempt.process.wait(NOTICE_SECONDS)
    seconds = rng.uniform(0.0, 2.0)
    if attempt.sleep(seconds):
        end_processes_of(attempt.folder)
        return "SIGKILL later"
    return LEFT_TO_ITSELF


def _power_cut(rng: random.Random, attempt: Attempt) -> str:
    end_processes_of(attempt.folder)
    return f"power cut: {lose_what_is_not_synced(attempt, rng)} files cut"


def _torn_newest(rng: random.Random, attempt: Attempt) -> str:
    end_processes_of(attempt.folder)
    steps = committed_steps(attempt.output_dir)
    if len(steps) < 2:  # nothing to fall back on
        return "SIGKILL to all"
    files = sorted(path for path in (attempt.output_dir / f"checkpoint-{steps[-1]}").iterdir() if path.stat().st_size)
    file = rng.choice(files)
    cut(file, rng, from_byte=0)
    return f"checkpoint-{steps[-1]}/{file.name} torn"


def _core_alone(rng: random.Random, attempt: Attempt) -> str:
    send(attempt.cores(), signal.SIGKILL)
    return "SIGKILL to wandb-core"


def _core_then_script(rng: random.Random, attempt: Attempt) -> str:
    send(attempt.cores(), signal.SIGKILL)
    attempt.sleep(rng.uniform(0.0, 1.0))
    end_processes_of(attempt.folder)
    return "SIGKILL to wandb-core, then to all"


def _script_then_core(rng: random.Random, attempt: Attempt) -> str:
    send(attempt.ranks() or [attempt.script], signal.SIGKILL)
    time.sleep(rng.uniform(0.0, 1.0))
    end_processes_of(attempt.folder)
    return "SIGKILL to the script, then to wandb-core"


DEATHS = {
    "kill_all": _kill_all,
    "kill_rank": _kill_rank,
    "term": _term,
    "usr1": _usr1,
    "interrupt": _interrupt,
    "interrupt_twice": _interrupt_twice,
    "hangup": _hangup,
    "closed_stdout": _closed_stdout,
    "clock": _clock,
    "stop": _stop,
    "stop_rank": _stop_rank,
    "read_only": _read_only,
    "disk_full": _disk_full,
    "power_cut": _power_cut,
    "torn_newest": _torn_newest,
    "core_alone": _core_alone,
    "core_then_script": _core_then_script,
    "script_then_core": _script_then_core,
}


def mend(attempt: Attempt) -> None:
    """Room on the disk, and folders that can be written."""
    (attempt.output_dir.parent / FILLER).unlink(missing_ok=True)
    mend_folder(attempt.output_dir)


def mend_folder(folder: Path) -> None:
    """Let it be changed again."""
    if folder.is_dir():
        subprocess.run(["chattr", "-i", str(folder)], check=False, capture_output=True)


def fill(folder: Path, *, left_bytes: int) -> None:
    """Fill the file system of the folder but for so many bytes."""
    descriptor = os.open(folder / FILLER, os.O_WRONLY | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):
            while True:
                os.write(descriptor, bytes(4096))
        size = os.fstat(descriptor).st_size
        os.ftruncate(descriptor, max(size - left_bytes, 0))
    finally:
        os.close(descriptor)


def lose_what_is_not_synced(attempt: Attempt, rng: random.Random) -> int:
    """
    Cut or zero files of the run that nobody has made durable, as a power cut may; returns how many.

    A file of rows that was synced keeps the rows it had then.
    """
    synced = _synced(attempt.folder / "synced")
    number = 0
    for path in sorted(attempt.output_dir.rglob("*")):
        facts = path.lstat()
        if not path.is_file() or path.is_symlink() or facts.st_size == 0:
            continue
        size, changed_at = synced.get(facts.st_ino, (0, 0))
        is_durable = changed_at == facts.st_mtime_ns or time.time() - facts.st_mtime > WRITTEN_BACK_SECONDS
        if is_durable or rng.random() < 0.4:
            continue
        from_byte = size if path.suffix == ".jsonl" else 0
        if from_byte < facts.st_size:
            cut(path, rng, from_byte=from_byte)
            number += 1
    return number


def _synced(told: Path) -> dict[int, tuple[int, int]]:
    """By inode the size and the time of change, when it was last synced."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for line in told.read_text(encoding="utf-8").splitlines():
            parts = line.split()
            if len(parts) == 3:
                found[int(parts[0])] = (int(parts[1]), int(parts[2]))
    return found


def cut(path: Path, rng: random.Random, *, from_byte: int) -> None:
    """Make it shorter, or its end zeros, somewhere behind `from_byte`."""
    size = path.stat().st_size
    place = rng.choice([from_byte, rng.randrange(from_byte, size)])
    os.truncate(path, place)
    if rng.random() < 0.4:
        os.truncate(path, size)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own in the folder, until the block ends; needs root's rights."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def sweep(folder: Path) -> None:
    """End what an earlier sitting in this folder left: processes, small disks, folders that can't be changed."""
    end_processes_of(folder)
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        place = Path(line.split()[1])
        if place.is_relative_to(folder) and place != folder:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
    if folder.is_dir():
        subprocess.run(["chattr", "-R", "-f", "-i", str(folder)], check=False, capture_output=True)
