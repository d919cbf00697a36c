"""Checkpoints are whole or absent: damage, kills, full disks and crafted files."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from harness.checkpoint.find import check_output_dir, choose_output_dir, find, list_checkpoints
from harness.checkpoint.flags import CheckpointConfig
from harness.checkpoint.layout import read, rng_file, why_invalid
from harness.checkpoint.manifest import STATE_FILE
from harness.checkpoint.writer import Checkpoints, Content
from harness.errors import CheckpointError, ConfigError
from harness.model.flags import DEFAULT_OPTIM
from harness.train import main
from harness.training import rng
from harness.training.state import TRAINER_STATE_FILE
from tests.support.forking import fork
from tests.support.parity import TRAINING, as_flags, assert_equal_runs, assert_equal_weights, reset, run_harness

ROOT = Path(__file__).parents[2]
FLAGS = ["--task=tests.support.tasks.parity_task:build", "--report_to=none", "--use_cpu"]
SAVING = {**TRAINING, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 5}

POSITION = {
    "epoch": 0,
    "batches": 5,
    "num_samples": 80,
    "num_processes": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}


def alone(value: Any) -> list[Any]:
    return [value]


def writer(folder: Path, **config: Any) -> Checkpoints:
    agree: Callable[[BaseException | None], str | None] = lambda error: None if error is None else str(error)  # noqa: E731
    return Checkpoints(
        folder, CheckpointConfig(**config), ranks=(0, 1), agree=agree, gather=lambda value: [value], meet=agree
    )


def save(checkpoints: Checkpoints, content: Content, *, best: str | None = None) -> None:
    checkpoints.save(content, best=best)
    checkpoints.check_last()


def content(step: int, write_model: Callable[[Path, Any], None] | None = None) -> Content:
    def write(folder: Path, weights: Any) -> None:
        save_file({"weight": torch.arange(494.0)}, folder / "model.safetensors")
        (folder / "model-00002-of-00002.safetensors").write_bytes(bytes(range(256)))

    return Content(
        step=step,
        weights={},
        write_model=write_model or write,
        files={
            "optimizer.pt": {"state": {0: {"exp_avg": torch.arange(9)}}, "param_groups": []},
            "scheduler.pt": {"last_epoch": step},
        },
        trainer_state={"global_step": step},
        rank_state=rng.capture_host(),
        shared={"data": POSITION},
    )


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A run with checkpoint-5 and checkpoint-10."""
    for step in (5, 10):
        save(writer(tmp_path), content(step))
    return tmp_path


def resumed(folder: Path, how: str = "auto") -> tuple[Path | None, tuple[str, ...]]:
    found = find(CheckpointConfig(output_dir=str(folder), resume_from_checkpoint=how), folder)
    return found.path, found.passed_over


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def newer_format(path: Path) -> None:
    manifest = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    (path / STATE_FILE).write_text(json.dumps({**manifest, "format_version": 99}), encoding="utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights removed": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    "a shard removed": (
        lambda path: (path / "model-00002-of-00002.safetensors").unlink(),
        "model-00002-of-00002.safetensors is missing",
    ),
    "optimizer removed": (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "generators removed": (lambda path: (path / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "state removed": (lambda path: (path / TRAINER_STATE_FILE).unlink(), f"{TRAINER_STATE_FILE} is missing"),
    "weights cut": (
        lambda path: (path / "model.safetensors").write_bytes(b"\0" * 100),
        "model.safetensors has 100 bytes instead of 2048",
    ),
    "weights flipped": (lambda path: flip(path / "model.safetensors"), "model.safetensors is damaged"),
    "optimizer flipped": (lambda path: flip(path / "optimizer.pt"), "optimizer.pt is damaged"),
    "state flipped": (lambda path: flip(path / TRAINER_STATE_FILE), f"{TRAINER_STATE_FILE} is damaged"),
    "manifest cut": (lambda path: (path / STATE_FILE).write_text('{"files'), f"{STATE_FILE} can't be read"),
    "manifest empty": (lambda path: (path / STATE_FILE).write_bytes(b""), f"{STATE_FILE} can't be read"),
    "newer format": (newer_format, f"{STATE_FILE} has format 99, this version reads up to 1"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(kind: str, two: Path) -> None:
    damage, reason = DAMAGE[kind]
    assert resumed(two) == (two / "checkpoint-10", ())
    damage(two / "checkpoint-10")
    for how in ("auto", "true"):
        path, passed_over = resumed(two, how)
        assert path == two / "checkpoint-5"
        assert len(passed_over) == 1
        assert passed_over[0].startswith(f"checkpoint-10: {reason}")
    with pytest.raises(ConfigError, match=reason):
        resumed(two, str(two / "checkpoint-10"))


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"files": 3}', '{"files": {"model.safetensors": {}}}', "null"])
def test_a_manifest_of_another_shape_is_a_reason_too(manifest: str, two: Path) -> None:
    (two / "checkpoint-10" / STATE_FILE).write_text(manifest, encoding="utf-8")
    path, passed_over = resumed(two)
    assert path == two / "checkpoint-5"
    assert len(passed_over) == 1


def test_a_checkpoint_without_a_manifest_is_a_trainers_and_needs_its_files(two: Path) -> None:
    (two / "checkpoint-10" / STATE_FILE).unlink()
    assert resumed(two)[0] == two / "checkpoint-10"
    (two / "checkpoint-10" / "optimizer.pt").unlink()
    path, passed_over = resumed(two)
    assert path == two / "checkpoint-5"
    assert "optimizer.pt missing" in passed_over[0]


def test_a_trainers_checkpoint_without_weights_is_no_whole_one(two: Path) -> None:
    for name in (STATE_FILE, "model.safetensors"):
        (two / "checkpoint-10" / name).unlink()
    assert resumed(two)[0] == two / "checkpoint-5"


def test_weights_alone_are_not_resumed(tmp_path: Path) -> None:
    save(writer(tmp_path), content(5))
    save(writer(tmp_path, save_only_model=True), content(10))
    assert {path.name for path in (tmp_path / "checkpoint-10").iterdir()} == {
        "model.safetensors",
        "model-00002-of-00002.safetensors",
        TRAINER_STATE_FILE,
        STATE_FILE,
    }
    path, passed_over = resumed(tmp_path)
    assert path == tmp_path / "checkpoint-5"
    assert "--save_only_model; use it as --model_name_or_path" in passed_over[0]


def test_damage_alone_is_refused_with_every_reason_by_true_and_auto(two: Path) -> None:
    for step in (5, 10):
        (two / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ConfigError, match=r"no whole checkpoint in .*checkpoint-10: .*checkpoint-5: .*use auto"):
        resumed(two, "true")
    with pytest.raises(ConfigError, match=r"is whole .*checkpoint-10: .*checkpoint-5: .*move or delete them"):
        resumed(two)


def test_auto_starts_afresh_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert resumed(tmp_path) == (None, ())


def test_nothing_is_resumed_unless_asked_for(two: Path) -> None:
    assert find(CheckpointConfig(output_dir=str(two)), two).path is None
    assert resumed(two, "false") == (None, ())


def test_checkpoints_are_ordered_by_number_and_leftovers_are_none(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20.partial", "checkpoint-x", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file", encoding="utf-8")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-100"]
    assert list_checkpoints(tmp_path / "gone") == []


def test_a_leftover_of_a_save_is_ignored_and_replaced(two: Path) -> None:
    partial = two / "checkpoint-15.partial"
    shutil.copytree(two / "checkpoint-10", partial)
    (partial / "stray").write_text("of another attempt", encoding="utf-8")
    assert resumed(two)[0] == two / "checkpoint-10"
    save(writer(two), content(15))
    assert not partial.exists()
    assert why_invalid(two / "checkpoint-15") is None
    assert not (two / "checkpoint-15" / "stray").exists()


def test_a_step_saved_again_replaces_its_checkpoint(two: Path) -> None:
    (two / "checkpoint-10" / "stray").write_text("old", encoding="utf-8")
    save(writer(two), content(10))
    assert not (two / "checkpoint-10" / "stray").exists()
    assert why_invalid(two / "checkpoint-10") is None


def test_a_save_that_fails_leaves_the_older_ones(two: Path) -> None:
    def full(folder: Path, weights: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device.*older ones are untouched.*--resume"):
        save(writer(two), content(15, full))
    assert [path.name for path in list_checkpoints(two)] == ["checkpoint-5", "checkpoint-10"]
    assert resumed(two)[0] == two / "checkpoint-10"


def test_a_bug_in_a_save_is_not_taken_for_a_full_disk(two: Path) -> None:
    def broken(folder: Path, weights: Any) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        save(writer(two), content(15, broken))


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (1, None, [4]),
        (2, 1, [1, 4]),
        (1, 1, [1, 4]),
        (3, 1, [1, 3, 4]),
        (2, 4, [3, 4]),
        (9, 1, [1, 2, 3, 4]),
    ],
)
def test_pruning_keeps_the_newest_and_the_best(
    limit: int | None, best: int | None, kept: list[int], tmp_path: Path
) -> None:
    checkpoints = writer(tmp_path, save_total_limit=limit)
    for step in (1, 2, 3, 4):
        path = str(tmp_path / f"checkpoint-{best}")
        save(checkpoints, content(step), best=path if best is not None and best <= step else None)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]


def test_pruning_keeps_what_was_just_saved_and_not_stale_later_steps(tmp_path: Path) -> None:
    checkpoints = writer(tmp_path, save_total_limit=2)
    for step in (1, 6, 2):
        save(checkpoints, content(step))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_a_kill_while_a_checkpoint_is_replaced_loses_none(two: Path) -> None:
    (two / "checkpoint-10").rename(two / "checkpoint-10.replaced")
    assert resumed(two) == (two / "checkpoint-10.replaced", ())
    save(writer(two), content(10))
    assert [path.name for path in list_checkpoints(two)] == ["checkpoint-5", "checkpoint-10"]


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_the_state_of_another_optimizer_is_refused(
    optim: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_harness(tmp_path / "run", {**SAVING, "max_steps": 5})
    reset()
    other = {**SAVING, "optim": optim, "resume_from_checkpoint": tmp_path / "run" / "checkpoint-5"}
    assert main([*FLAGS, *as_flags({**other, "output_dir": tmp_path / "on"})]) == 2
    assert f"--optim {DEFAULT_OPTIM}, not {optim}" in capsys.readouterr().err
    assert not (tmp_path / "on").exists()


def test_a_mixture_of_experts_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from harness.model.weights import load_weights, save_model

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=2, **sizes)
    model, other = MixtralForCausalLM(shape), MixtralForCausalLM(shape)
    save_model(model, None, tmp_path, as_published=False)
    load_weights(other, tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
        assert torch.equal(tensor, loaded.state_dict()[name]), name


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_crafted_file_is_refused_and_not_executed(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    checkpoint, mark = tmp_path / "run" / "checkpoint-10", tmp_path / "executed"
    torch.save({"state": Payload(mark)}, checkpoint / name)
    (checkpoint / STATE_FILE).unlink()  # as a Trainer's, which has no digests
    reset()
    assert main([*FLAGS, f"--output_dir={tmp_path / 'out'}", f"--resume_from_checkpoint={checkpoint}"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("harness train: ") == 1
    assert f"{name} can't be loaded safely" in shown
    assert "Traceback" not in shown
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Payload(mark)))  # noqa: S301 - the payload is live: this test could fail
    assert mark.exists()


def test_what_was_saved_is_what_is_read(two: Path) -> None:
    saved = read(two / "checkpoint-10", ranks=(0, 1))
    assert torch.equal(saved.files["optimizer.pt"]["state"][0]["exp_avg"], torch.arange(9))
    assert saved.files["scheduler.pt"] == {"last_epoch": 10}
    assert saved.rank_state is not None
    assert torch.equal(saved.rank_state["cpu"], torch.get_rng_state())
    assert saved.shared["data"] == POSITION
    assert saved.shared["world_size"] == 1


def test_another_number_of_ranks_reads_the_states_of_all(tmp_path: Path) -> None:
    save(writer(tmp_path), content(5))
    folder = tmp_path / "checkpoint-5"
    (folder / "rng_state.pth").unlink()
    for i in range(11):
        torch.save({**rng.capture_host(), "rank": i}, folder / f"rng_state_{i}.pth")
    manifest = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    (folder / STATE_FILE).write_text(json.dumps({**manifest, "world_size": 11}), encoding="utf-8")
    for world_size in (1, 2, 13):
        for rank in range(world_size):
            saved = read(folder, ranks=(rank, world_size))
            assert saved.rank_state is not None
            assert saved.rank_state["rank"] == rank % 11
            assert [state["rank"] for state in saved.other_ranks] == list(range(11))
    same = read(folder, ranks=(10, 11))
    assert same.rank_state is not None
    assert (same.rank_state["rank"], same.other_ranks) == (10, ())


def test_a_rank_that_a_trainers_checkpoint_lacks_goes_on_from_rank_zeros(tmp_path: Path) -> None:
    (tmp_path / TRAINER_STATE_FILE).write_text('{"global_step": 5}', encoding="utf-8")
    torch.save({**rng.capture_host(), "rank": 0}, tmp_path / "rng_state_0.pth")
    for rank in (0, 1):
        saved = read(tmp_path, ranks=(rank, 2))
        assert saved.rank_state is not None
        assert saved.rank_state["rank"] == 0
    (tmp_path / "rng_state_0.pth").unlink()
    assert read(tmp_path, ranks=(0, 2)).rank_state is None


def test_each_rank_has_the_trainers_file() -> None:
    assert (rng_file(0, 1), rng_file(0, 2), rng_file(1, 2)) == ("rng_state.pth", "rng_state_0.pth", "rng_state_1.pth")


def test_fresh_folders_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = set()
    for _ in range(3):
        path = choose_output_dir(CheckpointConfig())
        assert path not in seen
        path.mkdir(parents=True)
        seen.add(path)


@pytest.mark.parametrize(
    ("run_name", "suffix"),
    [
        ("lr-3e-4", "-lr-3e-4"),
        ("../a b/c:*", "-a-b-c"),
        ("한국어 실험", "-한국어-실험"),
        ("𠀀" * 300, "-" + "𠀀" * 50),
        ("//", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_a_fresh_folder_bears_the_runs_name(
    run_name: str | None, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = choose_output_dir(CheckpointConfig(), run_name)
    path.mkdir(parents=True)
    assert path.parent == Path("runs")
    assert re.fullmatch(r"\d{8}-\d{6}" + re.escape(suffix), path.name)
    assert choose_output_dir(CheckpointConfig(output_dir="given"), run_name) == Path("given")


def test_asking_for_a_folder_writes_nothing(tmp_path: Path) -> None:
    check_output_dir(tmp_path / "a" / "b", may_hold_run=False)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 15 steps, with checkpoints at 5, 10 and 15."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_harness(folder, SAVING)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-5", "checkpoint-10", "checkpoint-15"]
    return folder


def test_every_checkpoint_of_a_run_is_whole_and_none_is_left_half(trained: Path) -> None:
    assert [why_invalid(path) for path in list_checkpoints(trained)] == [None, None, None]
    assert not list(trained.glob("*.partial"))


def test_a_run_goes_on_from_the_older_checkpoint_when_the_newer_is_damaged(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    for step in (10, 15):
        flip(folder / f"checkpoint-{step}" / "model.safetensors")
    run_harness(folder, {**SAVING, "resume_from_checkpoint": "true"})
    shown = capsys.readouterr()
    assert "step 5 of 15" in shown.out
    for step in (10, 15):
        assert f"Passed over checkpoint-{step}: model.safetensors is damaged" in shown.err
    assert_equal_runs(trained, folder)
    assert [why_invalid(path) for path in list_checkpoints(folder)] == [None, None, None]


def test_a_checkpoint_of_another_model_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reset()
    flags = [*FLAGS, f"--output_dir={tmp_path / 'out'}", f"--resume_from_checkpoint={trained / 'checkpoint-5'}"]
    assert main([*flags, '--task_args={"llama": true}']) == 2
    shown = capsys.readouterr().err
    assert shown.count("harness train: ") == 1
    assert "is of another model" in shown
    assert "Use the model it was saved from" in shown
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.6 MB: more than is asked of it at the start, less than the run needs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root and mount")
    command = [mount, "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets nobody mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_older_checkpoint(
    small_disk: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / "out"
    saving = {**SAVING, "save_steps": 1}
    reset()
    flags = as_flags(
        {"task": "tests.support.tasks.parity_task:build", **saving, "output_dir": out, "report_to": "none"}
    )
    assert main([*flags, "--use_cpu"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("harness train: ") == 1
    assert "Traceback" not in shown
    assert "No space left" in shown
    assert "--resume_from_checkpoint true" in shown
    whole = list_checkpoints(out)
    assert 0 < len(whole) < 15
    assert [why_invalid(path) for path in whole] == [None] * len(whole)
    assert resumed(out)[0] == whole[-1]
    again = tmp_path / "again"
    run_harness(again, {**SAVING, "resume_from_checkpoint": whole[-1]})
    assert_equal_runs(trained, again)


def killed_when(argv: list[str], is_time: Callable[[], bool]) -> None:
    with Path(os.devnull).open("w") as out:
        process = fork(argv, env=os.environ, cwd=ROOT, out=out, err=out)
    try:
        deadline = time.monotonic() + 90
        while not is_time():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
    assert process.returncode == -signal.SIGKILL


def kill_and_resume(folder: Path, is_time: Callable[[], bool]) -> None:
    long = {**SAVING, "num_train_epochs": 8, "save_steps": 3, "resume_from_checkpoint": "auto", "save_total_limit": 3}
    flags = as_flags(
        {"task": "tests.support.tasks.parity_task:build", "report_to": "none", "output_dir": folder, **long}
    )
    killed_when(["-m", "harness.train", *flags, "--use_cpu"], is_time)
    run_harness(folder, long)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_harness(folder, {**SAVING, "num_train_epochs": 8, "save_strategy": "no"})
    return folder


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill_and_resume(folder, lambda: (folder / "checkpoint-12").is_dir())
    assert_equal_runs(uninterrupted, folder)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9, 18, 30, 42])
def test_a_run_killed_around_a_save_resumes_to_the_same_weights(step: int, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill_and_resume(folder, lambda: any(folder.glob(f"checkpoint-{step}.*partial")))
    assert_equal_weights(uninterrupted, folder)
    assert not list(folder.glob("*.partial"))
