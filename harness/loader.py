"""The training batches: their order, their number, and the exact position in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import broadcast_object_list, send_to_device
from datasets import Dataset
from torch.utils.data import DataLoader, get_worker_info
from transformers.trainer_utils import seed_worker

from harness import rng
from harness.data import Collator, DataConfig, Samples, worker_options
from harness.data_digest import digest_of_samples

Batch = dict[str, Any]
Order = npt.NDArray[np.int64]


class RankBatches:
    """
    The index batches of one rank in one epoch, from any position in O(1).

    Batch i of a rank is batch i * num_processes + process_index of the epoch. The last round is filled up with
    samples from the epoch's beginning, so that all ranks get as many full batches (accelerate's `even_batches`).
    """

    def __init__(self, num_samples: int, batch_size: int, *, ranks: tuple[int, int], drop_last: bool) -> None:
        self.batch_size = batch_size
        self.process_index, self.num_processes = ranks
        a_round = batch_size * self.num_processes
        self.num_batches = num_samples // a_round if drop_last else -(-num_samples // a_round)
        self.order: Callable[[], Order] = lambda: np.arange(num_samples)
        self.start = 0

    def begin(self, order: Callable[[], Order], start: int) -> None:
        """
        Take the epoch's order of samples and the position to start from.

        The order is asked for with the first batch: the loader draws its own random number before that, as torch's
        samplers have it.
        """
        self.order, self.start = order, start

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        missing = self.num_batches * self.batch_size * self.num_processes - len(order)
        if self.num_processes > 1 and missing > 0:
            order = np.concatenate([order, np.resize(order[: self.batch_size * self.num_processes], missing)])
        for i in range(self.start, self.num_batches):
            begin = (i * self.num_processes + self.process_index) * self.batch_size
            yield order[begin : begin + self.batch_size].tolist()


class RememberingCollator:
    """
    A collator that keeps the generators' state from before its last call.

    The loader is one batch ahead of the step that is saved, so a collator that draws random numbers has used the
    generators once more than the saved state shows. After a resume that one batch is collated again from the
    state it had, and the generators go on from the saved one. Workers have generators of their own: there
    nothing is kept.
    """

    def __init__(self, collate: Collator) -> None:
        self.collate = collate
        self.before: rng.RngState | None = None
        self._replay: tuple[rng.RngState, rng.RngState] | None = None
        self._skip = 0

    def replay(self, before: rng.RngState, after: rng.RngState, *, skip: int) -> None:
        """Let `skip` batches pass, collate the next one from `before`, then go on from `after`."""
        self._replay, self._skip = (before, after), skip

    def cancel_replay(self) -> bool:
        """Whether a replay was still waiting for its batch; it waits no more."""
        waiting, self._replay, self._skip = self._replay is not None, None, 0
        return waiting

    def __call__(self, samples: list[Any]) -> Mapping[str, Any]:
        """Collate, remembering."""
        if get_worker_info() is not None:
            return self.collate(samples)
        if self._skip > 0:
            self._skip -= 1
            return self.collate(samples)
        if self._replay is None:
            self.before = rng.capture_host()
            return self.collate(samples)
        (self.before, after), self._replay = self._replay, None
        rng.restore(self.before)
        batch = self.collate(samples)
        rng.restore(after)
        return batch


class TrainLoader:
    """
    The training batches of one rank, on its device, one batch ahead as accelerate's loader is.

    `num_batches` counts the micro-batches of a rank in an epoch; None for a stream.
    """

    def __init__(self, samples: Samples, config: DataConfig, accelerator: Accelerator, *, seed: int) -> None:
        self.config, self.accelerator = config, accelerator
        self.seed = seed if config.data_seed is None else config.data_seed
        self.epoch_index, self.batches_drawn = 0, 0
        self._exhausted = False
        self._resume: dict[str, Any] | None = None
        self._epoch_start: rng.RngState | None = None
        self.collate = RememberingCollator(samples.collate)
        loader_options: dict[str, Any] = {
            "collate_fn": self.collate,
            **worker_options(config),
            "worker_init_fn": partial(
                seed_worker, num_workers=config.dataloader_num_workers, rank=accelerator.process_index
            ),
        }
        self.is_stream = samples.is_stream
        self.num_samples: int | None = None
        self.num_batches: int | None = None
        if self.is_stream:
            self.stream = samples.dataset
            batching: dict[str, Any] = {
                "batch_size": config.per_device_train_batch_size,
                "drop_last": config.dataloader_drop_last,
            }
            if accelerator.num_processes > 1:
                # Each rank reads the stream and keeps its own samples: batches of any length, nothing is sent around.
                ranks = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
                self.stream = IterableDatasetShard(samples.dataset, **batching, **ranks)
            self.loader = DataLoader(self.stream, **batching, **loader_options)
            return
        self.num_samples = len(samples.dataset)
        places = (accelerator.process_index, accelerator.num_processes)
        self.batches = RankBatches(
            self.num_samples,
            config.per_device_train_batch_size,
            ranks=places,
            drop_last=config.dataloader_drop_last,
        )
        self.num_batches = len(self.batches)
        self.lengths = samples.lengths
        self.loader = DataLoader(samples.dataset, batch_sampler=self.batches, **loader_options)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """
        The rest of an epoch: all of it, or what a restored position leaves.

        Draws one number from torch's global generator at its beginning, as any DataLoader does.
        """
        resume, self._resume = self._resume, None
        start = self.batches_drawn if resume is not None else 0
        if resume is not None:
            # At an epoch's beginning nothing was drawn yet: the saved state is the one to begin with.
            rng.restore(resume["epoch_start"] if start > 0 and resume["epoch_start"] else resume["saved"])
        self.epoch_index, self.batches_drawn, self._exhausted = epoch, start, False
        self._epoch_start = rng.capture_host()
        if not self.is_stream:
            self.batches.begin(partial(self._order, epoch), start)
        elif hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)
        batches = self._one_ahead(iter(self.loader)) if self.remaining != 0 else iter(())
        if resume is not None and start > 0:
            self._go_on(batches, resume, skip=start if self.is_stream else 0)
        for batch in batches:
            self.batches_drawn += 1
            yield batch
        self._exhausted = True

    def _go_on(self, batches: Iterator[Batch], resume: dict[str, Any], *, skip: int) -> None:
        """Read a stream up to the position, and put the generators back to where they were at the save."""
        replays = resume["ahead"] is not None and self.remaining != 0
        if replays:
            self.collate.replay(before=resume["ahead"], after=resume["saved"], skip=skip)
        for _ in range(skip):
            next(batches, None)
        if not replays or (skip > 0 and self.collate.cancel_replay()):
            rng.restore(resume["saved"])

    def _one_ahead(self, batches: Iterator[Mapping[str, Any]]) -> Iterator[Batch]:
        current = next(batches, None)
        while current is not None:
            # From pinned memory the copy need not be waited for: waiting would be a host sync at every step.
            pinned = self.config.dataloader_pin_memory
            current = send_to_device(current, self.accelerator.device, non_blocking=pinned)
            following = next(batches, None)
            yield current
            current = following

    def _order(self, epoch: int) -> Order:
        # What RandomSampler does once accelerate has made it a SeedableRandomSampler.
        if self.config.train_sampling_strategy == "random":
            generator = torch.Generator().manual_seed(self.seed + epoch)
            return torch.randperm(self.num_samples or 0, generator=generator).numpy()
        if self.lengths is None:
            return np.arange(self.num_samples or 0)
        # It draws from the global generator, which ranks need not have in common after dropout.
        order = [list(self.lengths)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(order)
        return np.asarray(order[0])

    def finish_epoch(self) -> None:
        """Say that all that belongs to an epoch's end is done: a resume begins with the next one."""
        if self._exhausted or self.remaining == 0:
            self.epoch_index, self.batches_drawn = self.epoch_index + 1, 0

    @property
    def remaining(self) -> int | None:
        """Batches that this epoch still holds."""
        return None if self.num_batches is None else self.num_batches - self.batches_drawn

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it counts: plain values, the same on all ranks."""
        return {
            "epoch": self.epoch_index,
            "batches": self.batches_drawn,
            "num_samples": self.num_samples,
            "num_processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.config.per_device_train_batch_size,
            "gradient_accumulation_steps": self.config.gradient_accumulation_steps,
            "train_sampling_strategy": self.config.train_sampling_strategy,
            "dataloader_drop_last": self.config.dataloader_drop_last,
            # Workers share a stream out among themselves; elsewhere they change no order.
            "dataloader_num_workers": self.config.dataloader_num_workers if self.is_stream else None,
            "seed": self.seed,
            "data_digest": self.data_digest,
        }

    @cached_property
    def data_digest(self) -> str | None:
        """
        Of some training samples; None for a stream.

        None too where workers read the samples, except from a table of `datasets`: a file that is opened here before
        they start would be theirs too.
        """
        dataset = self.loader.dataset
        if self.is_stream or (self.config.dataloader_num_workers > 0 and not isinstance(dataset, Dataset)):
            return None
        return digest_of_samples(dataset)

    def rng_state_dict(self) -> dict[str, Any]:
        """What this rank's generators were at the epoch's beginning and before the batch drawn ahead."""
        ahead = self.collate.before if self.config.dataloader_num_workers == 0 else None
        return {"epoch_start": self._epoch_start, "ahead": ahead}

    def load_state_dict(self, position: Mapping[str, int], generators: Mapping[str, Any], saved: rng.RngState) -> None:
        """Continue from a position; `saved` is the generators' state at the save, put back when the data is there."""
        self.load_position(position)
        self._resume = {
            "epoch_start": generators.get("epoch_start"),
            "ahead": generators.get("ahead"),
            "saved": saved,
        }

    def load_position(self, position: Mapping[str, int]) -> None:
        """Continue from a position without generators: the order is right, what is drawn at random is not."""
        self.epoch_index, self.batches_drawn = position["epoch"], position["batches"]
        if self.config.ignore_data_skip:
            self.epoch_index += self.remaining == 0  # that epoch was over, but for what belongs to its end
            self.batches_drawn = 0
        now = rng.capture_host()
        self._resume = {"epoch_start": None, "ahead": None, "saved": now}

    def peek(self) -> Batch:
        """The first micro-batch of the order, collated without moving a generator or the position."""
        before = rng.capture_host()
        if self.is_stream:
            batch = next(iter(self.loader))
        else:
            indices = self._order(0)[: self.config.per_device_train_batch_size].tolist()
            batch = self.collate.collate([self.loader.dataset[i] for i in indices])
        rng.restore(before)
        return dict(send_to_device(batch, self.accelerator.device))


def step_groups(batches: Iterator[Batch], accumulation: int) -> Iterator[list[Batch]]:
    """The micro-batches of each optimizer step, all drawn before the first forward, as the Trainer draws them."""
    while window := list(islice(batches, accumulation)):
        yield window
