"""Checkpoints are written in the background, of one instant, and what fails is said and tried anew."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.checkpoint.find import list_checkpoints, remove_leftovers
from harness.checkpoint.flags import CheckpointConfig
from harness.checkpoint.layout import why_invalid
from harness.checkpoint.writer import Checkpoints, Content
from harness.errors import CheckpointError
from harness.files import digest_of
from harness.train import main
from harness.training import rng
from tests.support.launching import run
from tests.support.parity import TRAINING, as_flags, assert_equal_runs, reset, run_harness

SAVING = {**TRAINING, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 5, "eval_strategy": "no"}
WriteModel = Callable[[Path, Any], None]


def whole(folder: Path, weights: Any) -> None:
    save_file(dict(weights), folder / "model.safetensors")


def full(folder: Path, weights: Any) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    raise OSError(28, "No space left on device")


def content(step: int, write_model: WriteModel = whole, *, weight: torch.Tensor | None = None) -> Content:
    weight = torch.ones(4) if weight is None else weight
    return Content(
        step=step,
        weights={"weight": weight},
        write_model=write_model,
        files={"optimizer.pt": {"state": {0: {"exp_avg": weight}}, "param_groups": []}},
        trainer_state={"global_step": step},
        rank_state=rng.capture_host(),
        shared={},
    )


def in_one_process(error: BaseException | None) -> str | None:
    return None if error is None else str(error)


def alone(value: Any) -> list[Any]:
    return [value]


def writer(folder: Path, *, agree: Callable[..., str | None] = in_one_process, rank: int = 0, **config: Any) -> Any:
    ranks = (rank, 1 if rank == 0 else 2)
    return Checkpoints(
        folder, CheckpointConfig(**config), ranks=ranks, agree=agree, gather=lambda value: [value], meet=agree
    )


class Held:
    """A way to write a model that waits until it is released."""

    def __init__(self) -> None:
        self.began, self.release = threading.Event(), threading.Event()

    def __call__(self, folder: Path, weights: Any) -> None:
        self.began.set()
        assert self.release.wait(30)
        whole(folder, weights)


def test_a_checkpoint_holds_the_state_of_its_instant(tmp_path: Path) -> None:
    weight, held, checkpoints = torch.zeros(4), Held(), writer(tmp_path)
    checkpoints.save(content(1, held, weight=weight))
    assert held.began.wait(30)
    weight.fill_(9)  # the training goes on
    assert not checkpoints.path_of(1).exists()
    held.release.set()
    checkpoints.check_last()
    assert checkpoints.saved_step == 1
    folder = tmp_path / "checkpoint-1"
    assert load_file(folder / "model.safetensors")["weight"].tolist() == [0.0] * 4
    assert torch.load(folder / "optimizer.pt", weights_only=True)["state"][0]["exp_avg"].tolist() == [0.0] * 4


def test_without_async_save_it_is_on_disk_when_save_returns(tmp_path: Path) -> None:
    checkpoints = writer(tmp_path, async_save=False)
    checkpoints.save(content(1))
    assert why_invalid(tmp_path / "checkpoint-1") is None
    assert checkpoints.saved_step == 1


def test_a_save_that_has_no_memory_for_a_copy_is_written_before_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*size: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.uint8 and size != (0,):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(*size, **options)

    empty, weight, checkpoints = torch.empty, torch.zeros(4), writer(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", no_memory)
        checkpoints.save(content(1, weight=weight))
    weight.fill_(9)
    assert "There is no memory for a copy of checkpoint-1 (DefaultCPUAllocator: can't allocate memory)" in caplog.text
    checkpoints.save(content(2, weight=weight))
    checkpoints.check_last()
    assert [why_invalid(path) for path in list_checkpoints(tmp_path)] == [None, None]
    for step, value in ((1, 0.0), (2, 9.0)):
        folder = tmp_path / f"checkpoint-{step}"
        assert load_file(folder / "model.safetensors")["weight"].tolist() == [value] * 4
        assert torch.load(folder / "optimizer.pt", weights_only=True)["state"][0]["exp_avg"].tolist() == [value] * 4
    assert len(caplog.records) == 1


def test_a_save_waits_for_the_one_under_way_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def slow(folder: Path, weights: Any) -> None:
        time.sleep(1.3)
        whole(folder, weights)

    checkpoints = writer(tmp_path)
    with caplog.at_level(logging.WARNING):
        checkpoints.save(content(1, slow))
        checkpoints.save(content(2))
        checkpoints.check_last()
    assert [why_invalid(path) for path in list_checkpoints(tmp_path)] == [None, None]
    assert [record.getMessage()[:22] for record in caplog.records] == ["The training waited 1."]
    assert "until checkpoint-1 was written" in caplog.text
    assert 1.2 < checkpoints.held_seconds < 2.5


def test_a_failed_save_is_said_once_and_the_next_one_makes_it_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = writer(tmp_path)
    checkpoints.save(content(1))
    with caplog.at_level(logging.ERROR):
        checkpoints.save(content(2, full))
        checkpoints.settle()
        assert checkpoints.saved_step == 1
        with pytest.raises(CheckpointError, match=r"checkpoint-2 .*No space left.*older ones are untouched.*step-2.pt"):
            checkpoints.check_last()
        checkpoints.save(content(3))
        checkpoints.check_last()
    assert len(caplog.records) == 1
    assert "checkpoint-2 could not be written, the training goes on" in caplog.text
    weights = tmp_path / "weights-of-step-2.pt"
    assert torch.equal(torch.load(weights, weights_only=True)["weight"], torch.ones(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", weights.name]


def test_a_bug_of_the_writer_raises_at_the_next_save(tmp_path: Path) -> None:
    def broken(folder: Path, weights: Any) -> None:
        raise KeyError("a bug")

    checkpoints = writer(tmp_path)
    checkpoints.save(content(1, broken, weight=torch.arange(3)))
    with pytest.raises(KeyError, match="a bug"):
        checkpoints.save(content(2))
    found = torch.load(tmp_path / "weights-of-step-1.pt", weights_only=True)
    assert torch.equal(found["weight"], torch.arange(3))


def test_the_other_ranks_hear_of_what_failed_on_rank_zero(tmp_path: Path) -> None:
    answers = iter([None, "No space left", "a bug", None])
    other = writer(tmp_path, agree=lambda _: next(answers), rank=1)
    other.save(content(1))
    with pytest.raises(CheckpointError, match=r"checkpoint-1 could not be written.*No space left"):
        other.check_last()
    other.save(content(2))
    with pytest.raises(CheckpointError, match="a bug"):
        other.settle()
    assert not list(tmp_path.iterdir())  # rank zero alone writes


def test_what_follows_a_save_sees_it_whole_before_older_ones_are_deleted(tmp_path: Path) -> None:
    seen = []

    def then(folder: Path) -> None:
        assert threading.current_thread() is not threading.main_thread()
        seen.append((folder.name, why_invalid(folder), len(list_checkpoints(tmp_path))))

    checkpoints = writer(tmp_path, save_total_limit=1)
    for step in (1, 2):
        checkpoints.save(content(step), then=then)
    checkpoints.check_last()
    assert seen == [("checkpoint-1", None, 1), ("checkpoint-2", None, 2)]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_background_saves_write_what_saves_in_the_foreground_write(tmp_path: Path) -> None:
    for name, value in (("background", True), ("foreground", False)):
        run_harness(tmp_path / name, {**SAVING, "async_save": value})
    assert_equal_runs(tmp_path / "foreground", tmp_path / "background")
    checkpoints = list_checkpoints(tmp_path / "foreground")
    assert len(checkpoints) == 3
    for path in checkpoints:
        names = sorted(file.name for file in path.iterdir())
        other = tmp_path / "background" / path.name
        assert sorted(file.name for file in other.iterdir()) == names
        timed = ("trainer_state.json", "harness_state.json", "metrics.jsonl")
        exact = [name for name in names if name not in timed]
        assert [digest_of(path / name) for name in exact] == [digest_of(other / name) for name in exact]


@pytest.mark.slow
def test_a_checkpoint_each_step_is_whole_and_memory_does_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    save = Checkpoints.save

    def measured(self: Checkpoints, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        sizes.append((psutil.Process().memory_info().rss, self._copies.num_bytes))

    monkeypatch.setattr(Checkpoints, "save", measured)
    run_harness(tmp_path, {**SAVING, "save_steps": 1, "max_steps": 50})
    checkpoints = list_checkpoints(tmp_path)
    assert [path.name for path in checkpoints] == [f"checkpoint-{step}" for step in range(1, 51)]
    assert {why_invalid(path) for path in checkpoints} == {None}
    assert len({copies for _, copies in sizes[1:]}) == 1
    assert sizes[-1][0] - sizes[9][0] < 20 * 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB: more than the run needs, unless something else fills it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder]).returncode != 0:
        pytest.skip("mounting a small file system needs root, mount and a machine that lets one")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("is_freed", [True, False])
def test_a_disk_that_is_full_for_a_while_costs_no_more_than_the_saves_it_is_full_for(
    *, is_freed: bool, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / "out"
    task_args = {"fill": str(small_disk / "ballast"), "from_sample": 60, "to_sample": 100 if is_freed else 10_000}
    saving = {**SAVING, "save_steps": 3, "output_dir": out, "report_to": "none", "task_args": task_args}
    reset()
    flags = as_flags({"task": "tests.support.tasks.filling_task:build", **saving})
    assert main([*flags, "--use_cpu"]) == (0 if is_freed else 1)
    shown = capsys.readouterr()
    assert "could not be written, the training goes on: " in shown.err
    assert "No space left" in shown.err
    assert "Traceback" not in shown.err
    checkpoints = list_checkpoints(out)
    assert [why_invalid(path) for path in checkpoints] == [None] * len(checkpoints)
    steps = {int(path.name.rpartition("-")[2]) for path in checkpoints}
    assert 3 in steps
    assert len(steps) < 5
    if is_freed:
        assert 15 in steps
        run_harness(tmp_path / "undisturbed", SAVING)
        assert_equal_runs(tmp_path / "undisturbed", out)
    else:
        assert 15 not in steps
        assert "--resume_from_checkpoint true" in shown.err


@pytest.fixture
def undeletable() -> Iterator[Callable[[Path], None]]:
    """Makes a folder that can't be deleted, not by root either; skips where no way is known."""
    made: list[Path] = []

    def make(folder: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root can make a folder that can't be deleted")
        done = subprocess.run(["chattr", "+i", str(folder)], capture_output=True, check=False)
        if done.returncode == 0:
            made.append(folder)
            return
        done = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, check=False)
        if done.returncode != 0:
            pytest.skip("neither chattr nor a mount works here")
        mounted.append(folder)

    mounted: list[Path] = []
    yield make
    for folder in made:
        subprocess.run(["chattr", "-i", str(folder)], check=True)
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_checkpoint_that_can_not_be_deleted_is_passed_over_and_told_of_once(
    tmp_path: Path, undeletable: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = writer(tmp_path, save_total_limit=2)
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(content(step))
        checkpoints.check_last()
        if step == 1:
            undeletable(tmp_path / "checkpoint-1")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]
    assert [why_invalid(path) for path in list_checkpoints(tmp_path)] == [None] * 3
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("checkpoint-1 can't be deleted, the training goes on: ")


def test_the_end_of_a_training_keeps_a_checkpoint_that_can_not_be_deleted(
    tmp_path: Path, undeletable: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = writer(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(content(step))
    checkpoints.check_last()
    undeletable(tmp_path / "checkpoint-1")
    checkpoints.keep_only(str(tmp_path / "checkpoint-3"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3"]
    assert "checkpoint-1 can't be deleted" in caplog.text


def test_a_link_to_a_checkpoint_elsewhere_is_not_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    checkpoints = writer(folder, save_total_limit=1)
    checkpoints.save(content(1))
    checkpoints.check_last()
    (folder / "checkpoint-1").rename(tmp_path / "elsewhere")
    (folder / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    for step in (2, 3):
        checkpoints.save(content(step))
    checkpoints.check_last()
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-1", "checkpoint-3"]
    assert why_invalid(folder / "checkpoint-1") is None


@pytest.mark.parametrize(("name", "deleted"), [("checkpoint-1", 3), ("checkpoint-1.replaced", 0)])
def test_a_kill_in_the_middle_of_pruning_leaves_no_half_checkpoint(name: str, deleted: int, tmp_path: Path) -> None:
    """The process is killed before a file of the older one is deleted: the newer one is there, the rest soon is not."""
    checkpoints = writer(tmp_path)
    for step in (1, 2):
        checkpoints.save(content(step))
    checkpoints.check_last()
    (tmp_path / "checkpoint-1").rename(tmp_path / name)
    killed = run([sys.executable, "-c", PRUNES_AND_IS_KILLED, str(tmp_path), str(deleted)])
    assert killed.code == -signal.SIGKILL, killed.err
    (left,) = [path for path in tmp_path.iterdir() if path.name != "checkpoint-2"]
    assert len([*left.iterdir()]) > 0
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert remove_leftovers(tmp_path) == [left.name]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


PRUNES_AND_IS_KILLED = """
import os, signal, sys
from pathlib import Path
from harness.checkpoint.flags import CheckpointConfig
from harness.checkpoint.writer import Checkpoints

folder, left = Path(sys.argv[1]), int(sys.argv[2])
unlink = os.unlink

def one_fewer(*given, **options):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    unlink(*given, **options)

os.unlink = one_fewer
agree = lambda error: None
checkpoints = Checkpoints(folder, CheckpointConfig(), ranks=(0, 1), agree=agree, gather=lambda v: [v], meet=agree)
checkpoints.keep_only(str(folder / "checkpoint-2"))
"""


FILES: list[str] | None = None  # what is opened, while a list is here


def note_files(event: str, given: tuple[Any, ...]) -> None:
    if FILES is not None and event in ("open", "os.listdir", "os.scandir") and isinstance(given[0], (str, os.PathLike)):
        FILES.append(f"{event} {os.fspath(given[0])}")


@pytest.mark.slow
def test_a_start_among_a_thousand_checkpoints_opens_the_files_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.addaudithook(note_files)  # which stays for the rest of the process, and then does nothing
    at_once = {**SAVING, "max_steps": 1000, "save_steps": 1000, "logging_steps": 1000}
    run_harness(tmp_path / "run", at_once)
    opened = []
    for number in (10, 1000):
        folder = tmp_path / "many"
        shutil.copytree(tmp_path / "run", folder)
        for i in range(1, number):
            (folder / f"checkpoint-{i}").mkdir()
            for file in (folder / "checkpoint-1000").iterdir():
                (folder / f"checkpoint-{i}" / file.name).hardlink_to(file)
        assert len(list_checkpoints(folder)) == number
        with monkeypatch.context() as patched:
            patched.setattr(sys.modules[__name__], "FILES", found := [])
            run_harness(folder, {**at_once, "save_strategy": "no", "resume_from_checkpoint": "auto"})
        same = [re.sub(r"[0-9a-f]{8,}", "TOKEN", place) for place in found]
        opened.append(sorted(place for place in same if str(folder) in place))
        shutil.rmtree(folder)
    assert sum("checkpoint-1000/" in place for place in opened[0]) > 5
    assert opened[0] == opened[1]
