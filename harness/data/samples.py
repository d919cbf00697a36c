"""Data as the model takes it: samples without unused columns, evaluation loaders, options of workers."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, SequentialSampler, Subset
from transformers.trainer_utils import RemoveColumnsCollator, seed_worker

from harness.data.by_tokens import TokenBatches, TokenLimit
from harness.data.flags import DataConfig
from harness.data.lengths import Grouped, LengthGroups, Order, measure
from harness.errors import ConfigError
from harness.signals import outlive_stops

# Its collator logs once which keys it hides; shown with --log_level info.
library_logger = logging.getLogger("transformers.trainer")

Collator = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """
    A data set as the model takes it: without unused columns, and with its collator.

    Where the flags ask for it samples come in groups of similar length, or are divided into batches by their tokens.
    """

    dataset: Any
    collate: Collator
    lengths: Grouped | None = None
    by_tokens: TokenBatches | None = None

    @property
    def is_stream(self) -> bool:
        """Whether the samples come one after the other, without a length or an index."""
        return isinstance(self.dataset, torch.utils.data.IterableDataset)

    @property
    def eval_order(self) -> Order | None:
        """The order in which an evaluation reads the samples, the same each time; None if it is the data's."""
        if self.by_tokens is not None:
            return self.by_tokens.order
        return None if self.lengths is None else self.lengths.order()


def class_if_loaded(module: str, name: str) -> Any:
    """Return a library's class for `isinstance`; if its module was never imported (), which no object matches."""
    return getattr(sys.modules.get(module), name, ())


def first_samples(dataset: Any, count: int) -> Any:
    """Return the first samples of a data set. Raises ConfigError for a stream."""
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise ConfigError("--overfit_batches needs data with a length; with --streaming use --max_train_samples.")
    count = min(count, len(dataset))
    return (
        dataset.select(range(count))
        if isinstance(dataset, class_if_loaded("datasets", "Dataset"))
        else Subset(dataset, range(count))
    )


def build_eval_loader(samples: Samples, config: DataConfig, accelerator: Accelerator) -> Any:
    """
    Return a loader over an evaluation set in its order, prepared so that `gather_for_metrics` drops padding.

    With group_by_length the set is grouped too, always in the same way (as the Trainer does).
    """
    if samples.by_tokens is not None:
        return TokenRounds(samples, samples.by_tokens, config, accelerator)
    if samples.is_stream and accelerator.num_processes > 1:
        return StreamRounds(samples, config, accelerator)
    options: dict[str, Any] = {}
    if not samples.is_stream:
        options["drop_last"] = config.dataloader_drop_last
        if samples.lengths is not None:
            options["sampler"] = samples.lengths.order().tolist()
        elif accelerator.num_processes == 1:
            options["sampler"] = SequentialSampler(samples.dataset)
    loader = DataLoader(
        samples.dataset,
        batch_size=config.per_device_eval_batch_size,
        collate_fn=samples.collate,
        **worker_options(config, accelerator.device),
        **options,
    )
    return accelerator.prepare_data_loader(loader)


class StreamRounds:
    """
    The evaluation batches of one rank of a stream: each rank reads the whole stream and takes its part of each round.

    The parts are the same as accelerate's, whose own way gathers the batches of all ranks on rank zero and fails if
    their lengths differ. An uneven last round is filled up from the first; `gather_for_metrics` drops that.
    """

    def __init__(self, samples: Samples, config: DataConfig, accelerator: Accelerator) -> None:
        self.dataset, self.collate, self.accelerator = samples.dataset, samples.collate, accelerator
        # `gather_for_metrics` reads these from the active loader.
        self.end_of_dataloader, self.remainder = False, -1
        self.a_round = config.per_device_eval_batch_size * accelerator.num_processes
        self.rounds: DataLoader[Any] = DataLoader(
            samples.dataset, batch_size=self.a_round, collate_fn=list, **worker_options(config, accelerator.device)
        )

    def __iter__(self) -> Iterator[Any]:
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.accelerator.gradient_state._add_dataloader(self)
        first: list[Any] = []
        for samples in self.rounds:  # each worker's last round may be short
            first = first or samples
            share = -(-len(samples) // ranks)
            missing = share * ranks - len(samples)
            filled = samples + [first[i % len(first)] for i in range(missing)]
            self.end_of_dataloader, self.remainder = len(samples) < self.a_round, len(samples)
            batch = self.collate(filled[rank * share : (rank + 1) * share])
            yield send_to_device(batch, self.accelerator.device)
        self.accelerator.gradient_state._remove_dataloader(self)


class TokenRounds:
    """
    The evaluation batches of one rank where batches are made by tokens: its share of each.

    An uneven last one is filled up with its own samples; `gather_for_metrics` drops that.
    """

    def __init__(self, samples: Samples, batches: TokenBatches, config: DataConfig, accelerator: Accelerator) -> None:
        self.dataset, self.batches, self.accelerator = samples.dataset, batches, accelerator
        # `gather_for_metrics` reads these from the active loader.
        self.end_of_dataloader, self.remainder = False, -1
        self.shares: DataLoader[Any] = DataLoader(
            samples.dataset,
            batch_sampler=[self._share(i) for i in range(len(batches))],
            collate_fn=samples.collate,
            **worker_options(config, accelerator.device),
        )

    def __len__(self) -> int:
        return len(self.batches)

    def _share(self, number: int) -> list[int]:
        whole, rank, ranks = self.batches[number], self.accelerator.process_index, self.accelerator.num_processes
        share = -(-len(whole) // ranks)
        return [whole[i % len(whole)] for i in range(rank * share, (rank + 1) * share)]

    def __iter__(self) -> Iterator[Any]:
        self.accelerator.gradient_state._add_dataloader(self)
        for i, batch in enumerate(self.shares):
            self.end_of_dataloader, self.remainder = i + 1 == len(self), len(self.batches[i])
            yield send_to_device(batch, self.accelerator.device)
        self.accelerator.gradient_state._remove_dataloader(self)


def pins_memory(config: DataConfig, device: torch.device) -> bool:
    """
    Whether batches on their way to `device` lie in pinned memory, from which a copy need not be waited for.

    On the CPU there is nothing to copy, though the machine may have an accelerator; torch does not pin for MPS.
    """
    return config.dataloader_pin_memory and device.type not in ("cpu", "mps")


def worker_options(config: DataConfig, device: torch.device) -> dict[str, Any]:
    """Return the DataLoader's arguments that concern its workers and the way to `device`."""
    return {
        "num_workers": config.dataloader_num_workers,
        "pin_memory": pins_memory(config, device),
        "persistent_workers": config.dataloader_persistent_workers,
        "prefetch_factor": config.dataloader_prefetch_factor,
        "multiprocessing_context": config.dataloader_multiprocessing_context,
        "worker_init_fn": start_worker,
    }


def start_worker(worker_id: int, *, num_workers: int | None = None, rank: int = 0) -> None:
    """Begin a worker process of a DataLoader: with `num_workers` it has the Trainer's seed."""
    outlive_stops()
    if num_workers is not None:
        seed_worker(worker_id, num_workers, rank)


def usable_samples(
    dataset: Any,
    collate: Collator,
    model: torch.nn.Module,
    config: DataConfig,
    *,
    group: LengthGroups | TokenLimit | None,
    labels: Sequence[str] = (),
) -> Samples:
    """
    Hide what the model's forward does not take: columns of a `datasets` set, keys of other samples.

    `labels` stay, as `label` and `label_ids` do, which collators rename.

    Raises ConfigError if nothing is left, or if samples are to be grouped by a length they don't have.
    """
    shown, collate = _without_unused(dataset, collate, model, config, labels)
    if isinstance(group, TokenLimit):
        by_tokens = group.divide(dataset, column=config.length_column_name)
        return Samples(dataset=shown, collate=collate, by_tokens=by_tokens)
    lengths = None if group is None else _grouped(dataset, config, group)
    return Samples(dataset=shown, collate=collate, lengths=lengths)


def _without_unused(
    dataset: Any, collate: Collator, model: torch.nn.Module, config: DataConfig, labels: Sequence[str]
) -> tuple[Any, Collator]:
    if not config.remove_unused_columns:
        return dataset, collate
    wanted = [*inspect.signature(model.forward).parameters, *sorted({"label", "label_ids", *labels})]
    name = type(model).__name__
    tables = tuple(class_if_loaded("datasets", name) for name in ("Dataset", "IterableDataset"))
    if not isinstance(dataset, tables) or dataset.column_names is None:
        return dataset, RemoveColumnsCollator(collate, wanted, logger=library_logger, model_name=name)
    unused = [column for column in dataset.column_names if column not in wanted]
    if len(unused) == len(dataset.column_names):
        raise ConfigError(
            f"No column of the data ({', '.join(unused)}) is an argument of {name}.forward "
            f"({', '.join(wanted)}); rename them, or give --remove_unused_columns false."
        )
    return dataset.remove_columns(unused), collate


def _grouped(dataset: Any, config: DataConfig, group: LengthGroups) -> Grouped:
    try:
        lengths = measure(dataset, [group.input_name], column=config.length_column_name)
    except ValueError as error:
        raise ConfigError(
            f"--train_sampling_strategy=group_by_length: samples have no {group.input_name} to measure; "
            "name a column with --length_column_name."
        ) from error
    return Grouped(lengths=lengths[:, 0], size=group.size, seed=group.seed)
