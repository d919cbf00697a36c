"""Packed rows: what is in them, how full they are, and the exact place in them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset, IterableDataset

from harness.data.flags import DataConfig
from harness.data.loader import TrainLoader
from harness.data.packing import Packing, RowPlan, best_fit, collate_rows, lengths_of, packed, row_of
from harness.data.position import converted, why_other_order
from harness.data.streams import StreamBatches
from harness.errors import ConfigError
from harness.training import rng
from harness.training.weighing import num_documents, num_tokens
from tests.support.docstrings import PACKAGES, of_package

LENGTH = 32
SIZE = 211


def packing(**options: Any) -> Packing:
    return Packing(**{"max_length": LENGTH, "window": 24, "pad_token_id": 0, **options})


def document(number: int) -> dict[str, list[int]]:
    """One of 2 to 32 tokens, each of which says the document's number."""
    return {"input_ids": [number + 1] * (2 + (number * 7919) % 31)}


class Documents(Dataset):  # type: ignore[type-arg]
    """They remember which of them were read."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        self.read.append(index)
        return document(index)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """A stream with a state of its own; it remembers which of its documents were read."""

    def __init__(self, size: int = SIZE) -> None:
        self.size, self.start, self.at = size, 0, 0
        self.read: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["at"]

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        start, self.start = self.start, 0
        for i in range(start, self.size):
            self.read.append(i)
            self.at = i + 1
            yield document(i)


def table(size: int = SIZE) -> datasets.Dataset:
    return datasets.Dataset.from_list([document(i) for i in range(size)])


STREAMS = {
    "one of our own": Stream,
    "a table": lambda: table().to_iterable_dataset(),
    "three shards, mapped": lambda: table().to_iterable_dataset(num_shards=3).map(lambda row: dict(row), batched=True),
}


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def loader_of(
    accelerator: Accelerator, data: Any, *, packed_as: Packing | None = None, batch_size: int = 4, **config: Any
) -> TrainLoader:
    flags = DataConfig(per_device_train_batch_size=batch_size, **config)
    return TrainLoader(packed(data, packed_as or packing(seed=1)), flags, accelerator, seed=42)


def numbers_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The numbers of the documents in each row."""
    starts = batch["position_ids"] == 0
    return [
        [int(ids[i]) - 1 for i in range(LENGTH) if begins[i] and ids[i] > 0]
        for ids, begins in zip(batch["input_ids"], starts, strict=True)
    ]


def drawn(batches: Iterator[Any]) -> list[list[list[int]]]:
    return [numbers_of(batch) for batch in batches]


def written(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    with torch.serialization.safe_globals(
        [np.ndarray, np.dtype, np._core.multiarray._reconstruct, type(np.dtype(np.uint32))]
    ):
        return torch.load(file, weights_only=True)


def saved_of(loader: TrainLoader) -> Any:
    return written((loader.state_dict(), loader.rng_state_dict(), rng.capture_host()))


# Rows


def test_each_document_stands_whole_in_one_row_at_positions_from_0_with_its_first_token_no_target(
    accelerator: Accelerator,
) -> None:
    found: dict[int, int] = {}
    for batch in loader_of(accelerator, Documents()).epoch(0):
        assert set(batch) == {"input_ids", "position_ids", "labels"}
        assert batch["input_ids"].shape[1] == LENGTH
        for ids, positions, labels in zip(*batch.values(), strict=True):
            at = 0
            while at < LENGTH and ids[at] > 0:
                number = int(ids[at]) - 1
                length = len(document(number)["input_ids"])
                own = slice(at, at + length)
                assert ids[own].tolist() == [number + 1] * length
                assert positions[own].tolist() == list(range(length))
                assert labels[own].tolist() == [-100, *[number + 1] * (length - 1)]
                found[number] = found.get(number, 0) + 1
                at += length
            assert positions[at:].tolist() == [0] * (LENGTH - at), "each token of padding is a document of its own"
            assert (labels[at:] == -100).all()
    assert found == dict.fromkeys(range(SIZE), 1)


def test_labels_of_the_samples_stay_but_for_the_first() -> None:
    samples = [{"input_ids": [1, 2, 3], "labels": [1, -100, 3]}, {"input_ids": torch.tensor([4, 5])}]
    row = row_of(samples)
    assert row["labels"].tolist() == [-100, -100, 3, -100, 5]
    assert row["input_ids"].tolist() == [1, 2, 3, 4, 5]
    assert samples[0]["labels"] == [1, -100, 3], "the sample itself is as it was"


def test_documents_and_tokens_are_counted_without_padding() -> None:
    rows = [row_of([{"input_ids": [7] * n} for n in lengths]) for lengths in ((5, 2), (9,), (2, 2, 2))]
    batch = collate_rows(rows, max_length=10, pad_token_id=7)
    assert int(num_documents(batch)) == 6
    assert int(num_tokens(batch)) == 7 + 9 + 6


def test_real_documents_leave_less_than_one_percent_of_padding() -> None:
    lengths = np.array([max(2, len(text.split()) * 4 // 3) for name in PACKAGES for text in of_package(name)])
    lengths = np.minimum(lengths, 512)
    for seed in (None, 0, 1):
        plan = RowPlan.of(lengths, packing(max_length=512, window=512, seed=seed))
        assert sorted(plan.documents.tolist()) == list(range(len(lengths)))
        filled = [int(lengths[plan[row]].sum()) for row in range(len(plan))]
        assert max(filled) <= 512
        padding = 1 - sum(filled) / (512 * len(plan))
        assert padding < 0.01 + 2 / len(plan), "of each window one row may be left open"


def test_a_document_comes_into_the_fullest_row_that_has_room() -> None:
    rows = best_fit(np.array([6, 5, 4, 3, 2]), 10)
    assert rows.tolist() == [0, 1, 0, 1, 1]
    assert best_fit(np.array([2, 9, 8]), 10).tolist() == [1, 0, 1]


def test_rows_stand_where_their_longest_documents_stood() -> None:
    lengths = np.array([3, 30, 2, 31, 29, 3, 32])
    plan = RowPlan.of(lengths, packing(max_length=32, window=7))
    longest = [int(plan[row][lengths[plan[row]].argmax()]) for row in range(len(plan))]
    assert longest == sorted(longest)


def test_the_plan_follows_from_lengths_window_length_and_seed() -> None:
    lengths = np.array([len(document(i)["input_ids"]) for i in range(SIZE)])
    digest = RowPlan.of(lengths, packing(seed=1)).digest
    assert RowPlan.of(lengths.astype(np.int32), packing(seed=1)).digest == digest
    others = [packing(seed=2), packing(), packing(seed=1, window=25), packing(seed=1, max_length=33)]
    assert digest not in {RowPlan.of(lengths, other).digest for other in others}
    lengths[-1] -= 1
    assert RowPlan.of(lengths, packing(seed=1)).digest != digest


def test_lengths_of_a_table_are_those_of_its_samples_in_any_order() -> None:
    shuffled = table().shuffle(seed=3).select(range(50, 150))
    expected = [len(row["input_ids"]) for row in shuffled]
    assert lengths_of(shuffled).tolist() == expected
    assert lengths_of(shuffled.with_format("torch")).tolist() == expected
    cut = shuffled.with_transform(lambda batch: {"input_ids": [ids[:2] for ids in batch["input_ids"]]})
    assert lengths_of(cut).tolist() == [2] * 100


def test_what_can_not_be_packed_is_refused_in_a_line() -> None:
    with pytest.raises(ConfigError, match=r"sample 30 has 31 tokens, and a row --max_length=16"):
        packed([{"input_ids": [1] * (i + 1)} for i in range(31)], packing(max_length=16))
    with pytest.raises(ConfigError, match="no sample has two tokens"):
        packed([{"input_ids": [1]}, {"input_ids": []}], packing())
    with pytest.raises(ConfigError, match=r"no input_ids.*, which rows are made of"):
        packed([{"tokens": [1, 2]}], packing())
    with pytest.raises(ConfigError, match="no column input_ids, only: text"):
        packed(datasets.Dataset.from_dict({"text": ["a"]}), packing())
    with pytest.raises(ConfigError, match="a sample of the stream has 32 tokens"):
        list(packed(Stream(), packing(max_length=16)).dataset)


# The place in them


@pytest.mark.parametrize("strategy", ["random", "sequential"])
@pytest.mark.parametrize("data", [Documents, table], ids=["our own", "a table"])
def test_rows_go_on_with_the_very_batches_and_nothing_is_read_again(
    data: Any, strategy: str, accelerator: Accelerator
) -> None:
    def make() -> TrainLoader:
        return loader_of(accelerator, data(), train_sampling_strategy=strategy)

    whole = make()
    expected = [drawn(whole.epoch(epoch)) for epoch in (0, 1)]
    assert (expected[0] != expected[1]) == (strategy == "random")
    for stop in range(0, len(expected[0]) + 1, 5):
        first = make()
        head = drawn(itertools.islice(first.epoch(0), stop))
        saved = saved_of(first)
        resumed = make()
        resumed.load_state_dict(*saved)
        if isinstance(resumed.dataset.dataset, Documents):
            resumed.dataset.dataset.read.clear()
        assert head + drawn(resumed.epoch(0)) == expected[0]
        if isinstance(resumed.dataset.dataset, Documents):
            left = [number for batch in expected[0][stop:] for row in batch for number in row]
            assert resumed.dataset.dataset.read == left
        resumed.finish_epoch()
        assert drawn(resumed.epoch(1)) == expected[1]


@pytest.mark.parametrize("kind", STREAMS)
def test_a_packed_stream_goes_on_with_the_very_batches_from_any_place(kind: str, accelerator: Accelerator) -> None:
    whole = loader_of(accelerator, STREAMS[kind]())
    expected = [drawn(whole.epoch(epoch)) for epoch in range(3)]
    assert sorted(itertools.chain(*itertools.chain(*expected[0]))) == list(range(SIZE))
    for stop in range(len(expected[1]) + 1):
        first = loader_of(accelerator, STREAMS[kind]())
        drawn(first.epoch(0))
        first.finish_epoch()
        head = drawn(itertools.islice(first.epoch(1), stop))
        saved = saved_of(first)
        resumed = loader_of(accelerator, STREAMS[kind]())
        resumed.load_state_dict(*saved)
        assert not resumed.why_read_again
        assert head + drawn(resumed.epoch(1)) == expected[1], f"stopped after {stop}"
        resumed.finish_epoch()
        assert drawn(resumed.epoch(2)) == expected[2], f"stopped after {stop}"


def test_a_resumed_stream_reads_one_window_again_and_not_more(accelerator: Accelerator) -> None:
    first = loader_of(accelerator, Stream(2400))
    drawn(itertools.islice(first.epoch(0), 250))
    trained = max(number for batch in [first.dataset.stream.read] for number in batch)
    saved = saved_of(first)
    stream = Stream(2400)
    resumed = loader_of(accelerator, stream)
    resumed.load_state_dict(*saved)
    next(resumed.epoch(0))
    assert trained - 3 * 24 < min(stream.read), "the window under way, that of the batch ahead, and none before them"
    assert len(stream.read) <= 3 * 24


def test_a_stream_gives_the_rows_that_its_data_would_give_in_their_order() -> None:
    rows = packed(Documents(), packing()).dataset
    of_stream = list(packed(Stream(), packing(seed=5)).dataset)
    assert [row["input_ids"].tolist() for row in of_stream] == [row["input_ids"].tolist() for row in rows]


@pytest.mark.slow
def test_workers_of_a_packed_stream_go_on_where_each_of_them_was(accelerator: Accelerator) -> None:
    def make() -> TrainLoader:
        stream = table().to_iterable_dataset(num_shards=4)
        return loader_of(accelerator, stream, dataloader_num_workers=2, dataloader_persistent_workers=True)

    whole = make()
    expected = [drawn(whole.epoch(epoch)) for epoch in range(2)]
    assert sorted(itertools.chain(*itertools.chain(*expected[0]))) == list(range(SIZE))
    for stop in range(1, len(expected[0]) + 1, 7):
        first = make()
        head = drawn(itertools.islice(first.epoch(0), stop))
        saved = saved_of(first)
        resumed = make()
        resumed.load_state_dict(*saved)
        assert not resumed.why_read_again
        assert head + drawn(resumed.epoch(0)) == expected[0], f"stopped after {stop}"
        resumed.finish_epoch()
        assert drawn(resumed.epoch(1)) == expected[1], f"stopped after {stop}"


def rank_rows(ranks: int, batch_size: int, *, place: Any = None) -> tuple[list[Any], list[Any]]:
    """The rows of each round over all ranks of a stream, and the state after it."""
    rounds: list[Any] = []
    states: list[Any] = []
    for rank in range(ranks):
        samples = packed(Stream(), packing())

        def make(fetch: Any, *_: int) -> Any:
            read = fetch()
            return [row["input_ids"].tolist() for row in read] or None

        batches = StreamBatches(
            samples.dataset, make, batch_size=batch_size, drop_last=False, ranks=(rank, ranks), num_workers=0
        )
        batches.begin(0, place)
        for i, (batch, mark) in enumerate(batches):
            batches.consumed(mark)
            if len(rounds) <= i:
                rounds.append([])
                states.append(batches.state_dict())
            rounds[i] += [] if mark["is_repeated"] else list(batch)
    return rounds, states


def test_two_ranks_and_one_have_the_same_rows_of_a_stream_in_each_step() -> None:
    alone, _ = rank_rows(1, 8)
    two, states = rank_rows(2, 4)
    assert two == alone
    resumed, _ = rank_rows(2, 4, place=states[4])
    assert resumed == alone[5:]


def test_another_plan_is_another_order(accelerator: Accelerator) -> None:
    first = loader_of(accelerator, Documents()).state_dict()
    assert first["packing"].startswith(f"rows of {LENGTH} tokens out of 24 documents, plan ")
    other = loader_of(accelerator, Documents(), packed_as=packing(seed=1, window=25)).state_dict()
    assert "packing rows of 32 tokens out of 24 documents" in why_other_order(first, other)
    of_stream = loader_of(accelerator, Stream()).state_dict()
    assert of_stream["packing"] == f"rows of {LENGTH} tokens out of 24 documents"
    split = loader_of(accelerator, Documents(), batch_size=2, gradient_accumulation_steps=2).state_dict()
    assert why_other_order(first, split) == ""
    assert converted({**first, "batches": 5}, split) == {"epoch": 0, "batches": 10}


def test_samples_are_documents_where_a_plan_counts_them(accelerator: Accelerator) -> None:
    loader = loader_of(accelerator, Documents())
    assert loader.num_documents == SIZE
    assert loader.num_samples == len(loader.dataset) < SIZE / 1.5
    assert loader.documents_per_sample == SIZE / len(loader.dataset)
    drawn(loader.epoch(0))
    assert loader.documents_drawn == SIZE
