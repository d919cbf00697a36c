"""Large files are those that the libraries write, known by their digests, and written at a pace until they are due."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import zipfile
from pathlib import Path
from pickle import PicklingError
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from harness.checkpoint.disk import (
    CHUNK_BYTES,
    NICENESS,
    SHARE,
    SMALL_BYTES,
    Pace,
    PacedFile,
    PacedFolder,
    share_beside,
)
from harness.checkpoint.flags import CheckpointConfig
from harness.checkpoint.layout import why_invalid
from harness.checkpoint.writer import Checkpoints, Content
from harness.files import digest_of
from harness.model.weights import own_weights, save_model
from harness.training import rng

SELDOM = 0.02  # so small that a thread which others hold up rests all the same
HOURS = 1e-6  # a share with which a millisecond of work is followed by a rest of a quarter of an hour
TIED = {"n_layer": 1, "n_head": 2, "n_embd": 64, "vocab_size": SMALL_BYTES // (4 * 64) + 1, "n_positions": 8}


def facts_of(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest_of(path)}
        for path in folder.rglob("*")
        if path.is_file()
    }


def odd_tensors() -> dict[str, torch.Tensor]:
    """More than is written as the libraries write it: types, shapes and views that a file has to tell apart."""
    large = torch.randn(SMALL_BYTES // 4 + 7)
    return {
        "z.large": large,
        "tied": large,
        "half": torch.randn(3, 5).bfloat16(),
        "transposed": torch.randn(40, 30).T,
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "counts": torch.arange(9),
        "mask": torch.tensor([True, False, True]),
        "número": torch.randn(2, 1, 3),
    }


def apart(folder: Path, weights: Any) -> None:
    kept = {name: tensor.contiguous() for name, tensor in weights.items() if name != "tied"}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def by_hand() -> tuple[dict[str, torch.Tensor], Any]:
    return odd_tensors(), apart


def of_a_model() -> tuple[dict[str, torch.Tensor], Any]:
    model = GPT2LMHeadModel(GPT2Config(**TIED))
    weights = {name: tensor.detach() for name, tensor in own_weights(model).items()}
    return weights, lambda folder, given: save_model(model, None, folder, as_published=False, weights=given)


@pytest.mark.parametrize("source", [by_hand, of_a_model])
def test_weights_are_written_as_safetensors_and_transformers_write_them(source: Any, tmp_path: Path) -> None:
    weights, write = source()
    theirs, ours, given = tmp_path / "theirs", tmp_path / "ours", []
    theirs.mkdir()
    ours.mkdir()
    write(theirs, weights)

    def noting(path: Path, tensors: Any) -> None:
        given.append(sum(tensor.numel() for tensor in tensors.values()))
        write(path, tensors)

    folder = PacedFolder(ours, Pace())
    folder.save_model(weights, noting)
    assert len(given) == 1
    assert given[0] < 100  # one element of each; their bytes are not the library's work
    assert folder.facts() == facts_of(ours) == facts_of(theirs)


def test_weights_that_others_write_than_those_given_are_written_by_them(tmp_path: Path) -> None:
    """As of a model that is quantized, whose library takes the weights out of the model."""
    weights, own = {"weight": torch.randn(SMALL_BYTES)}, {"weight": torch.arange(12.0)}
    folder = PacedFolder(tmp_path, Pace())
    folder.save_model(weights, lambda path, _: save_file(own, path / "model.safetensors"))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight"], own["weight"])
    assert folder.facts() == facts_of(tmp_path)


def test_states_are_whole_archives_of_torch_that_can_be_mapped(tmp_path: Path) -> None:
    large = torch.randn(CHUNK_BYTES // 4 + 3)
    state = {"state": {0: {"exp_avg": large, "same": large, "step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]}
    folder = PacedFolder(tmp_path, Pace())
    folder.save("optimizer.pt", state)
    with zipfile.ZipFile(tmp_path / "optimizer.pt") as archive:
        assert archive.testzip() is None
    found = torch.load(tmp_path / "optimizer.pt", weights_only=True, mmap=True)
    assert torch.equal(found["state"][0]["exp_avg"], large)
    assert found["state"][0]["same"].data_ptr() == found["state"][0]["exp_avg"].data_ptr()
    assert folder.facts() == facts_of(tmp_path)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 4095])
def test_a_file_of_any_size_is_what_was_given(size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    with PacedFile(tmp_path / "file", Pace()) as file:
        for start in range(0, size, 1_000_003):
            file.write(data[start : start + 1_000_003])
    assert (tmp_path / "file").read_bytes() == data
    assert (file.size, file.sha256) == (size, hashlib.sha256(data).hexdigest())


def test_a_disk_that_is_full_is_an_error_of_the_system_also_where_files_can_not_bypass_the_cache() -> None:
    with pytest.raises(OSError, match="No space left"):  # not torch's RuntimeError
        PacedFolder(Path("/dev"), Pace()).save("full", {"large": torch.zeros(CHUNK_BYTES)})


def test_what_can_not_be_written_raises_what_torch_raises(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, PicklingError), match="lambda"):
        PacedFolder(tmp_path, Pace()).save("odd", {"large": torch.zeros(CHUNK_BYTES), "odd": lambda: None})


def test_a_writer_takes_no_more_of_the_time_than_its_share() -> None:
    pace, data = Pace(SELDOM), bytes(1 << 20)
    began, worked = time.monotonic(), time.thread_time()
    while time.thread_time() - worked < 0.04:
        hashlib.sha256(data)
        pace.rest()
    worked = time.thread_time() - worked
    assert time.monotonic() - began > (worked - 0.02) / SELDOM
    assert pace.rested_seconds > 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives threads priorities")
def test_a_writer_that_rests_has_a_lower_priority_than_the_training() -> None:
    found: dict[float, int] = {}

    def begin(share: float) -> None:
        Pace(share).begin()
        found[share] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = os.getpriority(os.PRIO_PROCESS, 0)
    for share in (0.5, 1.0):
        thread = threading.Thread(target=begin, args=(share,))
        thread.start()
        thread.join()
    assert found == {0.5: min(before + NICENESS, 19), 1.0: before}
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_a_rest_ends_when_somebody_waits() -> None:
    pace = Pace(HOURS)

    def work() -> None:
        pace.begin()
        for _ in range(40):
            hashlib.sha256(bytes(4 << 20))
            pace.rest()

    thread = threading.Thread(target=work)
    thread.start()
    pace.hurry()
    thread.join(60)
    assert not thread.is_alive()


def alone(error: BaseException | None) -> str | None:
    return None if error is None else str(error)


def with_a_share(folder: Path, share: float) -> Checkpoints:
    return Checkpoints(
        folder, CheckpointConfig(), ranks=(0, 1), agree=alone, gather=lambda each: [each], meet=alone, share=share
    )


def content(step: int, large: torch.Tensor) -> Content:
    return Content(
        step=step,
        weights={"large": large},
        write_model=lambda folder, weights: save_file(dict(weights), folder / "model.safetensors"),
        files={"optimizer.pt": {"state": {0: {"exp_avg": large}}, "param_groups": []}},
        trainer_state={"global_step": step},
        rank_state=rng.capture_host(),
    )


def test_the_next_save_and_the_end_hurry_a_writer_that_rests(tmp_path: Path) -> None:
    large, resting = torch.randn(SMALL_BYTES), with_a_share(tmp_path, HOURS)
    for step in (1, 2):
        resting.save(content(step, large))
    resting.check_last()
    assert [why_invalid(tmp_path / f"checkpoint-{step}") for step in (1, 2)] == [None, None]
    assert torch.equal(load_file(tmp_path / "checkpoint-2" / "model.safetensors")["large"], large)


def test_a_time_limit_counts_on_what_a_save_works_and_not_on_its_rests(tmp_path: Path) -> None:
    checkpoints, began = with_a_share(tmp_path, SELDOM), time.monotonic()
    checkpoints.save(content(1, torch.randn(SMALL_BYTES // 4)))
    while not (tmp_path / "checkpoint-1").is_dir():  # nobody waits for it, which would hurry it
        time.sleep(0.01)
    checkpoints.settle()
    rested = checkpoints._pace.rested_seconds
    assert rested > 0
    assert checkpoints.seconds_to_save() <= time.monotonic() - began - rested


def test_a_writer_rests_only_beside_a_training_that_computes_on_all_cores() -> None:
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    try:
        torch.set_num_threads(cores)
        assert share_beside(torch.device("cpu"), 1) == SHARE
        assert share_beside(torch.device("cuda"), 1) == 1.0
        torch.set_num_threads(1)
        assert share_beside(torch.device("cpu"), cores) == SHARE
        assert share_beside(torch.device("cpu"), 1) == (SHARE if cores == 1 else 1.0)
    finally:
        torch.set_num_threads(threads)
