"""Batches: the order that accelerate and the Trainer have, and the exact position in it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from transformers import BertConfig, BertForSequenceClassification
from transformers.trainer_pt_utils import LengthGroupedSampler

from harness.data.digest import digest_of_samples
from harness.data.flags import DataConfig
from harness.data.lengths import Grouped, LengthGroups
from harness.data.loader import RankBatches, TrainLoader, step_groups
from harness.data.samples import Samples, build_eval_loader, first_samples, usable_samples
from harness.errors import ConfigError
from harness.training import rng

SEED = 42


class Counted(Dataset):  # type: ignore[type-arg]
    """Sample i is i; it remembers which samples were read."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


class Sequences(Dataset):  # type: ignore[type-arg]
    """Sequences of unequal length."""

    def __init__(self, size: int) -> None:
        self.lengths = [1 + (7 * i) % 23 for i in range(size)]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [index] * self.lengths[index]}


def stack(samples: list[int]) -> dict[str, torch.Tensor]:
    return {"ids": torch.tensor(samples)}


def noisy(samples: list[int]) -> dict[str, torch.Tensor]:
    """Draws from all three generators, as random collators may."""
    noise = torch.rand(2) + np.random.rand() + torch.tensor(torch.randint(0, 9, (1,)).item())
    return {"ids": torch.tensor(samples), "noise": noise}


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=SEED))


def loader_of(
    accelerator: Accelerator, dataset: Any, collate: Any = stack, lengths: Any = None, **config: Any
) -> TrainLoader:
    samples = Samples(dataset=dataset, collate=collate, lengths=lengths)
    return TrainLoader(samples, DataConfig(**config), accelerator, seed=SEED)


def ids(batches: Any) -> list[list[int]]:
    return [batch["ids"].tolist() for batch in batches]


def shards(order: list[int], batch_size: int, world: int, rank: int, drop_last: bool) -> list[list[int]]:
    batches = BatchSampler(order, batch_size=batch_size, drop_last=drop_last)
    if world == 1:
        return list(batches)
    return list(BatchSamplerShard(batches, num_processes=world, process_index=rank, even_batches=True))


def test_batches_of_each_rank_are_accelerates_for_all_small_sizes() -> None:
    generator = np.random.default_rng(0)
    compared = 0
    for samples, batch_size, world, drop_last in itertools.product(
        range(1, 41), range(1, 5), range(1, 5), (False, True)
    ):
        order = generator.permutation(samples)
        for rank in range(world):
            expected = shards(order.tolist(), batch_size, world, rank, drop_last)
            found = RankBatches(samples, batch_size, ranks=(rank, world), drop_last=drop_last, fills=True)
            found.begin(lambda order=order: order, 0)  # type: ignore[misc]
            case = (samples, batch_size, world, rank, drop_last)
            assert list(found) == expected, case
            assert len(found) == len(expected), case
            compared += len(expected)
    assert compared > 10_000


def test_without_filling_each_sample_comes_once_and_all_ranks_have_as_many_batches() -> None:
    for samples, size, world in itertools.product(range(1, 41), range(1, 5), range(1, 5)):
        rounds: list[list[int]] = [[] for _ in range(-(-samples // (size * world)))]
        for rank in range(world):
            found = RankBatches(samples, size, ranks=(rank, world), drop_last=False)
            batches = list(found)
            assert len(batches) == len(rounds)
            assert all(0 < len(batch) <= size for batch in batches)
            for i, batch in enumerate(batches):
                rounds[i] += [] if found.is_repeated(i) else batch
        assert list(itertools.chain(*rounds)) == list(range(samples)), (samples, size, world)


def test_any_position_gives_the_rest_of_the_whole() -> None:
    for samples, world, drop_last in itertools.product((1, 7, 24, 25), (1, 2, 3), (False, True)):
        for rank in range(world):
            found = RankBatches(samples, 3, ranks=(rank, world), drop_last=drop_last)
            order = np.arange(samples)[::-1].copy()
            found.begin(lambda order=order: order, 0)  # type: ignore[misc]
            whole = list(found)
            for start in range(len(whole) + 1):
                found.begin(lambda order=order: order, start)  # type: ignore[misc]
                assert list(found) == whole[start:]


def test_random_order_of_each_epoch_is_that_of_accelerates_loader(accelerator: Accelerator) -> None:
    reference = accelerator.prepare_data_loader(
        DataLoader(Counted(23), batch_size=4, sampler=RandomSampler(Counted(23)), collate_fn=stack)
    )
    loader = loader_of(accelerator, Counted(23), per_device_train_batch_size=4)
    orders = []
    for epoch in range(3):
        reference.set_epoch(epoch)
        expected = ids(reference)
        orders.append(ids(loader.epoch(epoch)))
        assert orders[-1] == expected
    assert orders[0] != orders[1] != orders[2]


def test_data_seed_decides_the_order_alone(accelerator: Accelerator) -> None:
    plain = ids(loader_of(accelerator, Counted(23)).epoch(0))
    assert ids(loader_of(accelerator, Counted(23), data_seed=7).epoch(0)) != plain
    assert ids(loader_of(accelerator, Counted(23), data_seed=SEED).epoch(0)) == plain


def test_sequential_order_is_that_of_the_data(accelerator: Accelerator) -> None:
    loader = loader_of(accelerator, Counted(9), per_device_train_batch_size=4, train_sampling_strategy="sequential")
    assert ids(loader.epoch(0)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]] == ids(loader.epoch(1))


@pytest.mark.parametrize("drawn", [0, 1, 4, 11, 12])
def test_resume_in_mid_epoch_goes_on_with_the_same_samples(drawn: int, accelerator: Accelerator) -> None:
    config = {"per_device_train_batch_size": 4}
    whole = loader_of(accelerator, Counted(47), **config)
    expected = [ids(whole.epoch(epoch)) for epoch in range(3)]
    first = loader_of(accelerator, Counted(47), **config)
    assert len(ids(first.epoch(0))) == 12
    first.finish_epoch()
    assert ids(itertools.islice(first.epoch(1), drawn)) == expected[1][:drawn]
    resumed = loader_of(accelerator, Counted(47), **config)
    resumed.load_state_dict(first.state_dict(), first.rng_state_dict(), rng.capture_host())
    assert resumed.remaining == 12 - drawn
    assert ids(resumed.epoch(1)) == expected[1][drawn:]
    resumed.finish_epoch()
    assert (resumed.epoch_index, resumed.batches_drawn) == (2, 0)
    assert ids(resumed.epoch(2)) == expected[2]


def test_resume_at_90_percent_of_a_million_samples_reads_none_of_the_skipped(accelerator: Accelerator) -> None:
    dataset, batch_size = Counted(1_000_000), 10
    loader = loader_of(accelerator, dataset, per_device_train_batch_size=batch_size)
    position = {**loader.state_dict(), "epoch": 0, "batches": 90_000}
    dataset.read.clear()  # a few, for the digest
    loader.load_state_dict(position, {}, rng.capture_host())
    started_at = time.monotonic()
    first = next(loader.epoch(0))
    assert time.monotonic() - started_at < 1
    order = torch.randperm(1_000_000, generator=torch.Generator().manual_seed(SEED))
    assert first["ids"].tolist() == order[900_000:900_010].tolist()
    assert dataset.read == order[900_000:900_020].tolist(), "one batch, and one ahead"


def test_a_random_collator_resumes_to_the_bit(accelerator: Accelerator) -> None:
    config = {"per_device_train_batch_size": 4}

    def draw(loader: TrainLoader, epoch: int) -> Iterator[list[float]]:
        for batch in loader.epoch(epoch):
            # Dropout draws from the same generator, between the batches.
            yield [*batch["noise"].tolist(), *batch["ids"].tolist(), torch.rand(1).item()]

    for stop in range(6):
        rng.seed_everything(SEED, full_determinism=False)
        whole = loader_of(accelerator, Counted(21), noisy, **config)
        expected = [list(draw(whole, epoch)) for epoch in range(2)]
        assert len(expected[0]) == 6
        rng.seed_everything(SEED, full_determinism=False)
        first = loader_of(accelerator, Counted(21), noisy, **config)
        batches = draw(first, 0)
        head = list(itertools.islice(batches, stop))
        # A save happens here, with the generators as they are.
        saved = (first.state_dict(), first.rng_state_dict(), rng.capture_host())
        rng.seed_everything(7, full_determinism=False)
        resumed = loader_of(accelerator, Counted(21), noisy, **config)
        resumed.load_state_dict(*saved)
        assert [head + list(draw(resumed, 0)), list(draw(resumed, 1))] == expected, f"stopped after {stop}"


def test_position_without_generators_keeps_the_order(accelerator: Accelerator) -> None:
    config = {"per_device_train_batch_size": 4}
    expected = ids(loader_of(accelerator, Counted(21), **config).epoch(1))
    resumed = loader_of(accelerator, Counted(21), **config)
    resumed.load_position({"epoch": 1, "batches": 2})
    assert ids(resumed.epoch(1)) == expected[2:]


def test_ignore_data_skip_begins_the_epoch_anew(accelerator: Accelerator) -> None:
    expected = ids(loader_of(accelerator, Counted(21)).epoch(1))
    resumed = loader_of(accelerator, Counted(21), ignore_data_skip=True)
    resumed.load_position({"epoch": 1, "batches": 2})
    assert ids(resumed.epoch(1)) == expected


def test_state_counts_batches_and_what_they_are_counted_in(accelerator: Accelerator) -> None:
    loader = loader_of(accelerator, Counted(21), per_device_train_batch_size=4, gradient_accumulation_steps=2)
    next(group for group in step_groups(loader.epoch(0), 2))
    assert loader.state_dict() == {
        "epoch": 0,
        "batches": 2,
        "num_samples": 21,
        "num_processes": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random",
        "dataloader_drop_last": False,
        "dataloader_num_workers": None,
        "seed": SEED,
        "data_digest": digest_of_samples(Counted(21)),
    }


def test_samples_are_read_for_a_digest_where_nothing_of_them_is_shared_with_workers(accelerator: Accelerator) -> None:
    dataset = Counted(21)
    loader = loader_of(accelerator, dataset, dataloader_num_workers=1)
    assert loader.data_digest is None
    assert dataset.read == []
    rows = datasets.Dataset.from_dict({"ids": [1, 2]})
    assert loader_of(accelerator, rows, dataloader_num_workers=1).data_digest == digest_of_samples(rows)
    assert loader_of(accelerator, stream(10)).state_dict()["data_digest"] is None


def grouped(accelerator: Accelerator, size: int = 40, **config: Any) -> TrainLoader:
    dataset = Sequences(size)
    lengths = Grouped(lengths=np.array(dataset.lengths), size=8, seed=None)

    def first_ids(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"ids": torch.tensor([sample["input_ids"][0] for sample in samples])}

    config = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4, **config}
    return loader_of(accelerator, dataset, first_ids, lengths, **config)


def test_length_groups_are_the_trainers_and_resume(accelerator: Accelerator) -> None:
    torch.manual_seed(3)
    loader = grouped(accelerator)
    found = ids(loader.epoch(0))
    torch.manual_seed(3)
    torch.empty((), dtype=torch.int64).random_()  # what any DataLoader draws at its beginning
    sampler = LengthGroupedSampler(8, dataset=Sequences(40), model_input_name="input_ids")
    assert found == list(BatchSampler(sampler, batch_size=4, drop_last=False))
    torch.manual_seed(3)
    first = grouped(accelerator)
    head = ids(itertools.islice(first.epoch(0), 4))
    saved = (first.state_dict(), first.rng_state_dict(), rng.capture_host())
    torch.manual_seed(99)
    resumed = grouped(accelerator)
    resumed.load_state_dict(*saved)
    assert head + ids(resumed.epoch(0)) == found


def test_peek_moves_neither_generators_nor_position(accelerator: Accelerator) -> None:
    rng.seed_everything(SEED, full_determinism=False)
    plain = loader_of(accelerator, Counted(21), noisy, per_device_train_batch_size=4)
    expected = [(batch["ids"].tolist(), batch["noise"].tolist()) for batch in plain.epoch(0)]
    rng.seed_everything(SEED, full_determinism=False)
    loader = loader_of(accelerator, Counted(21), noisy, per_device_train_batch_size=4)
    before = loader.state_dict()
    peeked = loader.peek()
    assert loader.state_dict() == before
    assert peeked["ids"].tolist() == expected[0][0]
    assert [(batch["ids"].tolist(), batch["noise"].tolist()) for batch in loader.epoch(0)] == expected


def test_step_groups_draw_all_micro_batches_of_a_step_first() -> None:
    drawn: list[int] = []

    def batches() -> Iterator[dict[str, Any]]:
        for i in range(5):
            drawn.append(i)
            yield {"i": i}

    groups = step_groups(batches(), 2)
    assert [batch["i"] for batch in next(groups)] == [0, 1] == drawn
    assert [[batch["i"] for batch in group] for group in groups] == [[2, 3], [4]]


def stream(size: int) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"ids": list(range(size))}).to_iterable_dataset()


def test_a_stream_comes_in_its_order_and_resumes(accelerator: Accelerator) -> None:
    def make() -> TrainLoader:
        return loader_of(
            accelerator, stream(10), lambda rows: stack([row["ids"] for row in rows]), per_device_train_batch_size=4
        )

    loader = make()
    assert (loader.num_samples, loader.num_batches, loader.remaining) == (None, None, None)
    assert ids(loader.epoch(0)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    first = make()
    next(first.epoch(0))
    resumed = make()
    resumed.load_state_dict(first.state_dict(), first.rng_state_dict(), rng.capture_host())
    assert ids(resumed.epoch(0)) == [[4, 5, 6, 7], [8, 9]]
    assert resumed.state_dict()["batches"] == 3


def test_peek_at_a_stream_takes_nothing_from_it(accelerator: Accelerator) -> None:
    loader = loader_of(
        accelerator, stream(10), lambda rows: stack([row["ids"] for row in rows]), per_device_train_batch_size=4
    )
    assert loader.peek()["ids"].tolist() == [0, 1, 2, 3]
    assert ids(loader.epoch(0))[0] == [0, 1, 2, 3]


def test_first_samples_are_the_first(accelerator: Accelerator) -> None:
    rows = datasets.Dataset.from_dict({"ids": [5, 6, 7]})
    assert first_samples(rows, 2)["ids"] == [5, 6]
    assert [first_samples(Counted(9), 2)[i] for i in range(2)] == [0, 1]
    assert len(first_samples(Counted(3), 8)) == 3
    with pytest.raises(ConfigError, match="--overfit_batches needs data with a length"):
        first_samples(stream(3), 2)


def tiny_bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )


ROWS = {"text": ["a", "b", "c"], "input_ids": [[1], [2, 3], [4]], "label": [0, 1, 0], "number": [1, 2, 3]}


@pytest.mark.parametrize("streamed", [False, True])
def test_columns_that_the_model_does_not_take_are_hidden(streamed: bool) -> None:
    rows = datasets.Dataset.from_dict(ROWS)
    data = rows.to_iterable_dataset() if streamed else rows
    found = usable_samples(data, stack, tiny_bert(), DataConfig(), group=None)
    assert sorted(next(iter(found.dataset))) == ["input_ids", "label"]
    kept = usable_samples(data, stack, tiny_bert(), DataConfig(remove_unused_columns=False), group=None)
    assert kept.dataset is data


def test_keys_of_other_samples_are_hidden_from_the_collator() -> None:
    seen: list[dict[str, Any]] = []

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(samples)
        return {}

    found = usable_samples(Sequences(3), collate, tiny_bert(), DataConfig(), group=None)
    found.collate([{"input_ids": [1], "text": "a"}])
    assert seen == [{"input_ids": [1]}]


def test_data_without_a_usable_column_is_refused() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a"], "number": [1]})
    with pytest.raises(ConfigError, match=r"No column of the data \(text, number\).*--remove_unused_columns false"):
        usable_samples(rows, stack, tiny_bert(), DataConfig(), group=None)


def test_grouping_measures_the_input_or_takes_the_named_column() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1], [2, 3], [4]], "size": [9, 8, 7]})
    group = LengthGroups(size=2, input_name="input_ids")
    measured = usable_samples(rows, stack, tiny_bert(), DataConfig(), group=group)
    assert measured.lengths is not None
    assert measured.lengths.lengths.tolist() == [1, 2, 1]
    named = usable_samples(rows, stack, tiny_bert(), DataConfig(length_column_name="size"), group=group)
    assert named.lengths is not None
    assert named.lengths.lengths.tolist() == [9, 8, 7]


def test_grouping_samples_without_a_length_is_refused() -> None:
    group = LengthGroups(size=2, input_name="pixel_values")
    with pytest.raises(ConfigError, match=r"no pixel_values to measure.*--length_column_name"):
        usable_samples(Sequences(3), stack, tiny_bert(), DataConfig(), group=group)


def test_evaluation_goes_over_the_set_in_its_order(accelerator: Accelerator) -> None:
    samples = Samples(dataset=Counted(7), collate=stack)
    loader = build_eval_loader(samples, DataConfig(per_device_eval_batch_size=3), accelerator)
    assert ids(loader) == [[0, 1, 2], [3, 4, 5], [6]] == ids(loader)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size=0"),
        ({"per_device_eval_batch_size": -1}, "--per_device_eval_batch_size=-1"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps=0"),
        ({"overfit_batches": 0}, "--overfit_batches=0"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers=-1"),
        ({"data_seed": -1}, "--data_seed=-1"),
        ({"train_sampling_strategy": "shuffled"}, "--train_sampling_strategy=shuffled is not known"),
        ({"dataloader_prefetch_factor": 2}, "--dataloader_prefetch_factor needs --dataloader_num_workers"),
        ({"dataloader_persistent_workers": True}, "--dataloader_persistent_workers needs --dataloader_num_workers"),
        ({"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "thread"}, "context=thread is not known"),
        ({"dataloader_in_order": False}, "--dataloader_in_order=false"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DataConfig(**values)
