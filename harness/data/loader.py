"""The loader of training batches: their order, their number, and the exact position in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device
from torch.utils.data import DataLoader

from harness.data.batches import BatchMaker, IndexedBatches, as_it_is
from harness.data.by_tokens import TokenBatches
from harness.data.digest import digest_of_samples
from harness.data.flags import DataConfig
from harness.data.lengths import Order, random_order
from harness.data.packing import PackedRows, PackedStream
from harness.data.samples import Samples, class_if_loaded, pins_memory, start_worker, worker_options
from harness.data.streams import StreamBatches
from harness.distributed.ranks import ranks_of
from harness.training import rng
from harness.training.weighing import Repeated, num_documents

Batch = dict[str, Any]
# Each rank's state besides the position.
NOTHING_KEPT = {"epoch_start": None, "ahead": None, "stream": None}


class RankBatches:
    """
    The index batches of one rank in one epoch, from any position in O(1).

    Batch i of a rank is batch i * num_processes + process_index of the epoch. All ranks get the same number: in the
    last round a batch may be short, and a rank without samples of its own gets a batch from the epoch's beginning. With
    `fills` the whole round is filled up so (accelerate's `even_batches`).
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, ranks: tuple[int, int], drop_last: bool, fills: bool = False
    ) -> None:
        self.num_samples, self.batch_size, self.fills = num_samples, batch_size, fills
        self.process_index, self.num_processes = ranks
        a_round = batch_size * self.num_processes
        self.num_batches = num_samples // a_round if drop_last else -(-num_samples // a_round)
        self.order: Callable[[], Order | range] = lambda: range(num_samples)
        self.start = 0

    def begin(self, order: Callable[[], Order | range], start: int) -> None:
        """
        Set the epoch's order of samples and the position to start from.

        The order is only computed with the first batch: the loader draws its own random number before that, as with
        torch's samplers.
        """
        self.order, self.start = order, start

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        real = len(order)
        for i in range(self.start, self.num_batches):
            begin = (i * self.num_processes + self.process_index) * self.batch_size
            end = begin + self.batch_size
            own = order[begin:end]
            batch = list(own) if isinstance(own, range) else own.tolist()
            if self.num_processes > 1 and (self.fills or begin >= real):  # filled up from the epoch's first round
                first = min(self.batch_size * self.num_processes, real)
                batch += [int(order[(place - real) % first]) for place in range(max(begin, real), end)]
            yield batch

    def is_repeated(self, number: int) -> bool:
        """Whether this rank's batch of this number, from 0, has only samples that are in others already."""
        return (
            not self.fills and (number * self.num_processes + self.process_index) * self.batch_size >= self.num_samples
        )


class NumberedBatches:
    """
    The index batches of a rank as (epoch, number among those of all ranks, indices of samples).

    With `by_tokens` an index of `batches` is the number of such a batch.
    """

    def __init__(self, batches: RankBatches, by_tokens: TokenBatches | None) -> None:
        self.batches, self.by_tokens, self.epoch = batches, by_tokens, 0

    def __iter__(self) -> Iterator[tuple[int, int, list[int]]]:
        for i, indices in enumerate(self.batches, start=self.batches.start):
            number = i * self.batches.num_processes + self.batches.process_index
            yield self.epoch, number, self.samples_of(indices)

    def samples_of(self, indices: list[int]) -> list[int]:
        """Return the samples of an index batch."""
        return indices if self.by_tokens is None else self.by_tokens[indices[0]]


class TrainLoader:
    """
    The training batches of one rank, on its device, one batch ahead as accelerate's loader is.

    With `fills` the last round has repeated samples as the Trainer's, else a rank without samples a Repeated batch.

    `num_batches` is the number of micro-batches of a rank in an epoch; None for a stream.
    """

    def __init__(
        self, samples: Samples, config: DataConfig, accelerator: Accelerator, *, seed: int, fills: bool = False
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.seed = seed if config.data_seed is None else config.data_seed
        self.epoch_index, self.batches_drawn = 0, 0
        self._exhausted = False
        self._resume: dict[str, Any] | None = None
        self._epoch_start: rng.RngState | None = None
        self.make = BatchMaker(
            samples.collate, seed=seed if config.dataloader_seed_batches else None, device=accelerator.device
        )
        self.dataset, self.lengths, self.by_tokens = samples.dataset, samples.lengths, samples.by_tokens
        packs = isinstance(samples.dataset, (PackedRows, PackedStream))
        self.documents_drawn = 0  # of packed rows, by this rank and in this process
        self.packing: str | None = samples.dataset.described if packs else None
        self.num_samples: int | None = None
        self.num_units = 0  # what the order is of: samples, or batches by tokens
        self.num_batches: int | None = None
        self.stream: StreamBatches | None = None
        ranks = ranks_of(accelerator)
        batch_size, drop_last = config.per_device_train_batch_size, config.dataloader_drop_last
        options: dict[str, Any] = {
            "batch_size": None,  # the data set's items are batches already
            "collate_fn": as_it_is,
            **worker_options(config, accelerator.device),
            "worker_init_fn": partial(
                start_worker, num_workers=config.dataloader_num_workers, rank=accelerator.process_index
            ),
        }
        if samples.is_stream:
            self.stream = StreamBatches(
                samples.dataset,
                self.make,
                batch_size=batch_size,
                drop_last=drop_last,
                fills=fills,
                ranks=ranks,
                num_workers=config.dataloader_num_workers,
            )
            self.loader: DataLoader[Any] = DataLoader(self.stream, **options)
            return
        self.num_samples = self.num_units = len(samples.dataset)
        if self.by_tokens is not None:
            self.num_units, batch_size = len(self.by_tokens), 1
        self.batches = RankBatches(self.num_units, batch_size, ranks=ranks, drop_last=drop_last, fills=fills)
        self.num_batches = len(self.batches)
        self.numbered = NumberedBatches(self.batches, self.by_tokens)
        dataset: Any = IndexedBatches(samples.dataset, self.make)
        self.loader = DataLoader(dataset, sampler=self.numbered, **options)

    @property
    def num_documents(self) -> int | None:
        """The number of samples, of packed rows that of their documents; None for a stream."""
        return self.dataset.num_documents if isinstance(self.dataset, PackedRows) else self.num_samples

    @property
    def documents_per_sample(self) -> float:
        """The mean number of documents in a packed row; 1 for other samples, and where it is not known: in a stream."""
        if self.packing is None or not self.num_documents or not self.num_samples:
            return 1
        return self.num_documents / self.num_samples

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """
        Yield the rest of an epoch: all of it, or what a restored position leaves.

        Draws one number from torch's global generator at its beginning, as any DataLoader does.
        """
        resume, self._resume = self._resume, None
        start = self.batches_drawn if resume is not None else 0
        if resume is not None:
            # At an epoch's beginning no batch was drawn yet, so the saved state is that of the beginning.
            at_start = resume["epoch_start"] if start > 0 and resume["epoch_start"] else resume["saved"]
            rng.restore(at_start, self.accelerator.device)
        self.epoch_index, self.batches_drawn, self._exhausted = epoch, start, False
        self._epoch_start = rng.capture_host()
        place = resume["stream"] if resume is not None and start > 0 else None
        if self.stream is not None:
            self.stream.begin(epoch, place)
        else:
            self.batches.begin(partial(self._order, epoch), start)
            self.numbered.epoch = epoch
        batches = self._one_ahead(iter(self.loader)) if self.remaining != 0 else iter(())
        if resume is not None and start > 0:
            self._go_on(batches, resume, skip=start if self.stream is not None and place is None else 0)
        for batch, mark in batches:
            self._consume(mark)
            is_repeated = mark["is_repeated"] if mark else self.batches.is_repeated(self.batches_drawn)
            self.batches_drawn += 1
            yield Repeated(batch) if is_repeated else batch
        self._exhausted = True

    def _go_on(self, batches: Iterator[tuple[Batch, Any]], resume: dict[str, Any], *, skip: int) -> None:
        """Restore the generators of the save; read a stream without state up to its position."""
        replays = resume["ahead"] is not None and self.remaining != 0
        if replays:
            self.make.replay(before=resume["ahead"], after=resume["saved"], skip=skip)
        for _, mark in islice(batches, skip):
            self._consume(mark)
        if skip > 0:
            self.make.cancel_replay()  # if the stream has ended before
        if skip > 0 or not replays:
            rng.restore(resume["saved"], self.accelerator.device)

    def _consume(self, mark: Any) -> None:
        if self.stream is not None:
            self.stream.consumed(mark)

    def _one_ahead(self, made: Iterator[tuple[Mapping[str, Any] | None, Any]]) -> Iterator[tuple[Batch, Any]]:
        batches = (pair for pair in made if pair[0] is not None)
        current = next(batches, None)
        while current is not None:
            # Without waiting, which pinned memory allows: a wait would be a host sync at every step. From other memory
            # MPS would copy what has been overwritten since.
            pinned = pins_memory(self.config, self.accelerator.device)
            if self.packing is not None:
                self.documents_drawn += int(num_documents(current[0] or {}))
            batch = send_to_device(current[0], self.accelerator.device, non_blocking=pinned)
            following = next(batches, None)
            yield batch, current[1]
            current = following

    def _order(self, epoch: int) -> Order | range:
        # As RandomSampler, after accelerate has made it a SeedableRandomSampler.
        if self.config.train_sampling_strategy == "random":
            return random_order(self.num_units, torch.Generator().manual_seed(self.seed + epoch))
        if self.lengths is None:
            return range(self.num_units)
        # It draws from the global generator, which may differ between ranks after dropout.
        order = self.lengths.order()
        if self.accelerator.num_processes > 1:
            order = broadcast(torch.from_numpy(order).to(self.accelerator.device)).cpu().numpy()
        return order

    def finish_epoch(self) -> None:
        """Mark the epoch and its work at the end as done: a resume begins with the next one."""
        if self._exhausted or self.remaining == 0:
            self.epoch_index, self.batches_drawn = self.epoch_index + 1, 0

    @property
    def remaining(self) -> int | None:
        """The number of batches left in this epoch; None for a stream."""
        return None if self.num_batches is None else self.num_batches - self.batches_drawn

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it is counted in: plain values, the same on all ranks."""
        return {
            "epoch": self.epoch_index,
            "batches": self.batches_drawn,
            "num_samples": self.num_samples,
            "num_processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.config.per_device_train_batch_size,
            "gradient_accumulation_steps": self.config.gradient_accumulation_steps,
            "train_sampling_strategy": self.config.train_sampling_strategy,
            "dataloader_drop_last": self.config.dataloader_drop_last,
            # Workers divide a stream among themselves; otherwise their number does not change the order.
            "dataloader_num_workers": self.config.dataloader_num_workers if self.stream is not None else None,
            "seed": self.seed,
            "data_digest": self.data_digest,
            **({} if self.packing is None else {"packing": self.packing}),
            **({} if self.by_tokens is None else self.by_tokens.state_dict()),
        }

    @cached_property
    def data_digest(self) -> str | None:
        """
        Return a digest of some training samples; None for a stream.

        Also None where workers read the samples, except from a table of `datasets`: a file that is opened here before
        they start would be shared with them.
        """
        has_workers = self.config.dataloader_num_workers > 0
        source = self.dataset.dataset if isinstance(self.dataset, PackedRows) else self.dataset
        is_table = isinstance(source, class_if_loaded("datasets", "Dataset"))
        if self.stream is not None or (has_workers and not is_table):
            return None
        return digest_of_samples(self.dataset)

    def rng_state_dict(self) -> dict[str, Any]:
        """
        Return this rank's own state as plain values.

        It holds the generators at the epoch's beginning and before the batch drawn ahead, and the position of the
        stream.
        """
        ahead = self.make.before if self.config.dataloader_num_workers == 0 else None
        stream = None if self.stream is None else self.stream.state_dict()
        return {"epoch_start": self._epoch_start, "ahead": ahead, "stream": stream}

    def load_state_dict(self, position: Mapping[str, int], generators: Mapping[str, Any], saved: rng.RngState) -> None:
        """
        Continue from a position.

        `saved` is the generators' state at the save, restored once the data has been reached.
        """
        self.load_position(position)
        self._resume = {name: generators.get(name) for name in NOTHING_KEPT} | {"saved": saved}

    def load_position(self, position: Mapping[str, int]) -> None:
        """Continue from a position without generators: the order is the same, random draws differ."""
        self.epoch_index, self.batches_drawn = position["epoch"], position["batches"]
        if self.config.ignore_data_skip:
            self.epoch_index += self.remaining == 0  # only the work at the end of that epoch was left
            self.batches_drawn = 0
        self._resume = {**NOTHING_KEPT, "saved": rng.capture_host()}

    @property
    def why_read_again(self) -> str:
        """Why a resumed stream has to be read from the epoch's beginning; empty if it need not be."""
        if self.stream is None or self._resume is None or self.batches_drawn == 0 or self._resume["stream"]:
            return ""
        return self.stream.fault or "the checkpoint has no state of it for these processes and batches"

    def peek(self) -> Batch:
        """Return the first micro-batch, collated, without changing the generators or the position."""
        before = rng.capture_host()
        if self.stream is not None:
            batch = next(iter(self.loader))[0]
        else:
            self.batches.begin(partial(self._order, 0), 0)
            batch = IndexedBatches(self.dataset, self.make)[next(iter(self.numbered))][0]
        rng.restore_host(before)
        return dict(send_to_device(batch, self.accelerator.device))


def step_groups(batches: Iterator[Batch], accumulation: int) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each optimizer step, all drawn before the first forward, as the Trainer draws them."""
    while window := list(islice(batches, accumulation)):
        yield window
