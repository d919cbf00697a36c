"""Streams: the batches that accelerate would make of them, and a resume from their own state."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset

from harness.data.flags import DataConfig
from harness.data.loader import TrainLoader
from harness.data.samples import Samples
from harness.data.streams import StreamBatches, why_no_state
from harness.errors import ConfigError
from harness.training import rng
from tests.support.launching import DDP, SCRIPT, flags, launcher, run
from tests.support.parity import TRAINING, assert_equal_runs, run_harness

SIZE = 41


class Numbers(IterableDataset):  # type: ignore[type-arg]
    """A stream with a state of its own; it remembers which of its samples were read."""

    def __init__(self, size: int = SIZE) -> None:
        self.size, self.start, self.at = size, 0, 0
        self.read: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"at": np.int64(self.at)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = int(state["at"])

    def __iter__(self) -> Iterator[dict[str, int]]:
        for i in range(self.start, self.size):
            self.read.append(i)
            self.at = i + 1
            yield {"ids": i}


def rows(start: int = 0, stop: int = SIZE) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"ids": list(range(start, stop))})


def generated(numbers: list[int]) -> Iterator[dict[str, int]]:
    yield from ({"ids": i} for i in numbers)


def doubled(batch: dict[str, list[int]]) -> dict[str, list[int]]:
    return {"ids": [i for i in batch["ids"] for _ in range(2)]}


STREAMS = {
    "one of our own": Numbers,
    "one shard": lambda: rows().to_iterable_dataset(),
    "three shards": lambda: rows().to_iterable_dataset(num_shards=3),
    "shards in another order each epoch": lambda: rows().to_iterable_dataset(num_shards=7),
    "generator": lambda: datasets.IterableDataset.from_generator(generated, gen_kwargs={"numbers": list(range(SIZE))}),
    "map in batches": lambda: rows().to_iterable_dataset(num_shards=2).map(doubled, batched=True, batch_size=5),
    "filter": lambda: rows().to_iterable_dataset(num_shards=2).filter(lambda row: row["ids"] % 3 > 0),
    "skip and take": lambda: rows().to_iterable_dataset(num_shards=2).skip(3).take(30),
    "one after the other": lambda: datasets.concatenate_datasets(
        [rows(0, 20).to_iterable_dataset(), rows(20).to_iterable_dataset()]
    ),
    "mixed at random": lambda: datasets.interleave_datasets(
        [rows(0, 20).to_iterable_dataset(num_shards=2), rows(20).to_iterable_dataset(num_shards=2)],
        probabilities=[0.4, 0.6],
        seed=3,
        stopping_strategy="all_exhausted",
    ),
    "shuffled buffer": lambda: rows().to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=8),
}
READ_AGAIN = {"shuffled buffer"}


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Draws from the generators too, as random collators may."""
    return {"ids": torch.tensor([int(sample["ids"]) for sample in samples]), "noise": torch.rand(2)}


def loader_of(accelerator: Accelerator, stream: Any, **config: Any) -> TrainLoader:
    samples = Samples(dataset=stream, collate=collate)
    return TrainLoader(samples, DataConfig(per_device_train_batch_size=4, **config), accelerator, seed=42)


def drawn(batches: Iterator[dict[str, torch.Tensor]], *, noise: bool = True) -> list[tuple[Any, ...]]:
    found = []
    for batch in batches:
        # Dropout draws from the same generator, between the batches.
        found.append((batch["ids"].tolist(), batch["noise"].tolist() if noise else None, torch.rand(1).item()))
    return found


def written(value: Any) -> Any:
    """Through a file that is read without trust."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    with torch.serialization.safe_globals(
        [np.ndarray, np.dtype, np._core.multiarray._reconstruct, type(np.dtype(np.uint32))]
    ):
        return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_goes_on_with_the_very_batches(kind: str, accelerator: Accelerator) -> None:
    for stop in (0, 1, 4, 7, 10):
        rng.seed_everything(42, full_determinism=False)
        whole = loader_of(accelerator, STREAMS[kind]())
        expected = [drawn(whole.epoch(epoch)) for epoch in range(3)]
        assert len(expected[1]) > 6
        rng.seed_everything(42, full_determinism=False)
        first = loader_of(accelerator, STREAMS[kind]())
        drawn(first.epoch(0))
        first.finish_epoch()
        head = drawn(itertools.islice(first.epoch(1), stop))
        saved = written((first.state_dict(), first.rng_state_dict(), rng.capture_host()))
        rng.seed_everything(7, full_determinism=False)
        resumed = loader_of(accelerator, STREAMS[kind]())
        resumed.load_state_dict(*saved)
        assert bool(resumed.why_read_again) == (kind in READ_AGAIN and stop > 0)
        assert head + drawn(resumed.epoch(1)) == expected[1], f"stopped after {stop}"
        resumed.finish_epoch()
        assert drawn(resumed.epoch(2)) == expected[2], f"stopped after {stop}"


WITH_WORKERS = {
    "one of our own": (),  # each worker reads all of it
    "three shards": (),
    "shards in another order each epoch": (),
    "map in batches": (),
    "mixed at random": (),
    "shuffled buffer": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True], ids=["fresh workers", "workers that stay"])
@pytest.mark.parametrize("kind", WITH_WORKERS)
def test_workers_go_on_where_each_of_them_was(kind: str, persistent: bool, accelerator: Accelerator) -> None:
    options = {"dataloader_num_workers": 2, "dataloader_seed_batches": True}
    options["dataloader_persistent_workers"] = persistent

    def make() -> TrainLoader:
        return loader_of(accelerator, STREAMS[kind](), **options)

    rng.seed_everything(42, full_determinism=False)
    whole = make()
    expected = [drawn(whole.epoch(epoch)) for epoch in range(3)]
    assert len(expected[1]) > 8
    for stop in range(1, len(expected[1]) + 1, 3):
        rng.seed_everything(42, full_determinism=False)
        first = make()
        drawn(first.epoch(0))
        first.finish_epoch()
        head = drawn(itertools.islice(first.epoch(1), stop))
        saved = written((first.state_dict(), first.rng_state_dict(), rng.capture_host()))
        rng.seed_everything(7, full_determinism=False)
        resumed = make()
        resumed.load_state_dict(*saved)
        assert bool(resumed.why_read_again) == (kind in READ_AGAIN)
        assert head + drawn(resumed.epoch(1)) == expected[1], f"stopped after {stop}"
        resumed.finish_epoch()
        assert drawn(resumed.epoch(2)) == expected[2], f"stopped after {stop}"


def test_no_sample_is_read_again(accelerator: Accelerator) -> None:
    first = loader_of(accelerator, Numbers(1000))
    drawn(itertools.islice(first.epoch(0), 200))
    saved = written((first.state_dict(), first.rng_state_dict(), rng.capture_host()))
    stream = Numbers(1000)
    resumed = loader_of(accelerator, stream)
    resumed.load_state_dict(*saved)
    drawn(itertools.islice(resumed.epoch(0), 3))
    assert stream.read == list(range(800, 816)), "three batches, and one ahead"


def test_no_sample_of_datasets_is_mapped_again(accelerator: Accelerator) -> None:
    seen: list[int] = []

    def make() -> TrainLoader:
        stream = rows(0, 1000).to_iterable_dataset().map(lambda row: seen.append(row["ids"]) or row)
        return loader_of(accelerator, stream)

    first = make()
    drawn(itertools.islice(first.epoch(0), 200))
    saved = written((first.state_dict(), first.rng_state_dict(), rng.capture_host()))
    seen.clear()
    resumed = make()
    resumed.load_state_dict(*saved)
    drawn(itertools.islice(resumed.epoch(0), 3))
    assert seen == list(range(800, 816))


def test_a_state_without_plain_values_is_not_kept(accelerator: Accelerator) -> None:
    class Odd(Numbers):
        def state_dict(self) -> dict[str, Any]:
            return {"at": self.at, "self": self}

    first = loader_of(accelerator, Odd())
    head = drawn(itertools.islice(first.epoch(0), 4))
    saved = written((first.state_dict(), first.rng_state_dict(), rng.capture_host()))
    assert saved[1]["stream"] is None
    resumed = loader_of(accelerator, Odd())
    resumed.load_state_dict(*saved)
    assert "has no state" in resumed.why_read_again
    assert next(resumed.epoch(0))["ids"][0] == len(head) * 4


def test_a_state_of_another_stream_is_refused(accelerator: Accelerator) -> None:
    first = loader_of(accelerator, rows().to_iterable_dataset())
    drawn(itertools.islice(first.epoch(0), 4))
    saved = written((first.state_dict(), first.rng_state_dict(), rng.capture_host()))
    changed = loader_of(accelerator, rows().to_iterable_dataset().filter(lambda row: row["ids"] > 3))
    changed.load_state_dict(*saved)
    with pytest.raises(ConfigError, match=r"can't go on from its saved state .*--ignore_data_skip"):
        next(changed.epoch(0))


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (Numbers(), ""),
        (rows().to_iterable_dataset().map(doubled, batched=True), ""),
        (rows().to_iterable_dataset().shuffle(buffer_size=4).map(doubled, batched=True).take(9), "shuffle buffer"),
        (
            datasets.interleave_datasets(
                [rows().to_iterable_dataset(), rows().to_iterable_dataset().shuffle(buffer_size=4)]
            ),
            "shuffle buffer",
        ),
        (IterableDatasetShard(Numbers()), "no state_dict"),
    ],
    ids=["own", "mapped", "shuffled, then mapped and cut", "one of two shuffled", "without a state"],
)
def test_streams_that_can_not_go_on_from_a_state_are_known(stream: Any, says: str) -> None:
    assert says in why_no_state(stream)
    assert bool(says) == bool(why_no_state(stream))


def only_samples(fetch: Any, *number: int) -> Any:
    samples = fetch()
    return {"ids": [int(sample["ids"]) for sample in samples]} if samples else None


def parts(
    stream: Any, batch_size: int, ranks: tuple[int, int], drop_last: bool, *, fills: bool = True
) -> StreamBatches:
    options: dict[str, Any] = {"batch_size": batch_size, "drop_last": drop_last, "ranks": ranks, "fills": fills}
    return StreamBatches(stream, only_samples, num_workers=0, **options)


def test_each_rank_reads_what_accelerate_would_give_it_from_any_place() -> None:
    compared = 0
    for size, batch_size, world, drop_last in itertools.product(
        (1, 5, 12, 13, 23), (1, 2, 3), (1, 2, 3), (False, True)
    ):
        for rank in range(world):
            shard: Any = Numbers(size)
            if world > 1:
                shard = IterableDatasetShard(shard, batch_size, drop_last, world, rank)
            reference = DataLoader(
                shard,
                batch_size=batch_size,
                drop_last=drop_last,
                collate_fn=lambda samples: [s["ids"] for s in samples],
            )
            expected = list(reference)
            batches = parts(Numbers(size), batch_size, (rank, world), drop_last)
            batches.begin(0, None)
            states, found = [batches.state_dict()], []
            for batch, mark in batches:
                batches.consumed(mark)
                states.append(batches.state_dict())
                found.append(batch["ids"])
            case = (size, batch_size, world, drop_last, rank)
            assert found == expected, case
            for place, state in enumerate(states):
                resumed = parts(Numbers(size), batch_size, (rank, world), drop_last)
                resumed.begin(0, state)
                assert [batch["ids"] for batch, _ in resumed] == expected[place:], (case, place)
                resumed.begin(1, None)
                assert [batch["ids"] for batch, _ in resumed] == expected, "the next epoch begins at the beginning"
                compared += 1
    assert compared > 300


def test_without_filling_each_sample_of_a_stream_comes_once_from_any_place() -> None:
    for size, batch_size, world in itertools.product((1, 5, 12, 13, 23), (1, 2, 3), (1, 2, 3)):
        rounds: list[list[int]] = [[] for _ in range(-(-size // (batch_size * world)))]
        for rank in range(world):
            batches = parts(Numbers(size), batch_size, (rank, world), False, fills=False)
            batches.begin(0, None)
            states, own = [batches.state_dict()], []
            for batch, mark in batches:
                batches.consumed(mark)
                states.append(batches.state_dict())
                own.append((batch["ids"], mark["is_repeated"]))
            assert len(own) == len(rounds)
            for i, (ids, is_repeated) in enumerate(own):
                rounds[i] += [] if is_repeated else ids
                for place, state in enumerate(states):
                    resumed = parts(Numbers(size), batch_size, (rank, world), False, fills=False)
                    resumed.begin(0, state)
                    assert [(batch["ids"], mark["is_repeated"]) for batch, mark in resumed] == own[place:]
        assert list(itertools.chain(*rounds)) == list(range(size)), (size, batch_size, world)


# Whole runs

STREAMING = {**TRAINING, "max_steps": 20, "save_strategy": "steps", "save_steps": 6, "num_train_epochs": 1}
TASK = "tests.support.tasks.drawing_task:build"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("arrow", {}),
        ("shuffled", {}),
        ("stateless", {"gradient_accumulation_steps": 2}),
        pytest.param("arrow", {"dataloader_num_workers": 2}, marks=pytest.mark.slow),
        pytest.param("shuffled", {"dataloader_num_workers": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_interrupted_stream_ends_with_the_bits_of_the_whole(
    kind: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {**STREAMING, **options, "task_args": {"kind": kind, "random_collator": not options}}
    run_harness(tmp_path / "whole", arguments, task=TASK)
    for step in (6, 18):  # in the first epoch and in the second
        resumed = tmp_path / f"from-{step}"
        capsys.readouterr()
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        run_harness(resumed, {**arguments, "resume_from_checkpoint": checkpoint}, task=TASK)
        assert capsys.readouterr().out.count("The stream is read again") == (kind != "arrow")
        assert_equal_runs(tmp_path / "whole", resumed)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_of_a_stream_go_on_to_the_bit(workers: int, tmp_path: Path) -> None:
    arguments = {**STREAMING, "per_device_train_batch_size": 4, "task_args": {"kind": "arrow"}, "task": TASK}
    arguments["dataloader_num_workers"] = workers
    ended = run([*launcher(DDP), "--num_processes=2", SCRIPT, *flags(tmp_path / "whole", arguments)])
    assert ended.code == 0, ended.err[-3000:]
    checkpoint = tmp_path / "whole" / "checkpoint-12"
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    arguments["resume_from_checkpoint"] = checkpoint
    ended = run([*launcher(DDP), "--num_processes=2", SCRIPT, *flags(tmp_path / "resumed", arguments)])
    assert ended.code == 0, ended.err[-3000:]
    assert "The stream is read again" not in ended.out
    assert_equal_runs(tmp_path / "whole", tmp_path / "resumed")
