"""A disk that turns read-only in the middle of a training: nothing of before is touched, and the end is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faulty_training import Training
from tests.support.launching import SCRIPT


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own at `out`; as root, and where the kernel has loop devices."""
    image, out = tmp_path / "image", tmp_path / "out"
    out.mkdir()
    line = f"truncate -s 60M {image} && mkfs.ext4 -q {image} && mount -o loop,errors=remount-ro {image} {out}"
    if os.geteuid() != 0 or subprocess.run(line, shell=True, check=False, capture_output=True).returncode != 0:  # noqa: S602
        pytest.skip("a file system can't be mounted here")
    (out / "lost+found").rmdir()
    yield out
    subprocess.run(["umount", out], check=True)


def turn_read_only(disk: Path) -> None:
    """As the kernel does it when it finds the file system damaged; files that are open are concerned too."""
    device = subprocess.check_output(["findmnt", "-no", "SOURCE", disk], text=True).strip()
    Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("1")


@pytest.mark.slow
def test_a_disk_that_turns_read_only_leaves_the_checkpoints_and_the_weights(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    command = (sys.executable, SCRIPT)  # a forked process knows its temporary folder already
    training = Training(tmp_path, None, pace=0.1, command=command, variables={"TMPDIR": str(tmp_path / "temporary")})
    training.reach(14)
    turn_read_only(disk)
    training.ended(1)
    assert (disk / "checkpoint-10").is_dir()
    assert "checkpoint-20 could not be written, the training goes on: [Errno 30] Read-only file system" in training.err
    (line,) = [line for line in training.err.splitlines() if line.startswith("harness train: ")]
    assert "Read-only file system" in line
    assert "make it writable" in line
    assert "weights-of-step-30.pt" in line
    assert list((tmp_path / "temporary").rglob("weights-of-step-30.pt"))
    assert "Traceback" not in training.err
    assert "Logging error" not in training.err
    assert any("deliver" in row or "lost" in row for row in training.report), training.report
