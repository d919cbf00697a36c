"""Pack documents into rows of equal length: which row each comes into, and data whose samples are rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, IterableDataset

from harness.data.flags import DataConfig
from harness.data.lengths import measure
from harness.data.samples import Samples, class_if_loaded
from harness.errors import ConfigError
from harness.training import rng

Numbers = npt.NDArray[np.int64]
# A row before it is padded: input_ids, position_ids and labels, one number for each of its tokens.
Row = dict[str, Numbers]

SHORTEST = 2  # tokens: in a document of one there is nothing to predict
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Packing:
    """
    How rows are made: of `max_length` tokens, each of documents of one window.

    A window is `window` documents that stand one after the other, in the data or in an order drawn from `seed`.
    """

    max_length: int
    window: int
    pad_token_id: int
    seed: int | None = None

    def __str__(self) -> str:
        return f"rows of {self.max_length} tokens out of {self.window} documents"


def check_packing(data: DataConfig, *, use_cache: bool) -> None:
    """Raise ConfigError for flags that mean nothing with packed rows, or would let documents see each other."""
    if data.train_sampling_strategy == "group_by_length":
        raise ConfigError(
            "--train_sampling_strategy=group_by_length does nothing with --packing, whose rows are equally long; use "
            "random or sequential."
        )
    if data.max_tokens_per_batch is not None:
        raise ConfigError(
            f"--max_tokens_per_batch={data.max_tokens_per_batch} does nothing with --packing, whose batches have "
            "--per_device_train_batch_size rows of --max_length tokens; leave one of the two out."
        )
    if data.overfit_batches is not None:
        raise ConfigError(
            f"--overfit_batches={data.overfit_batches} counts samples, and --packing joins them to rows; use "
            "--max_train_samples, or leave --packing out."
        )
    if use_cache:
        raise ConfigError("--use_cache lets packed documents see each other; leave it out, or --packing.")


def check_rows_of_evaluation(num_rows: int, data: DataConfig, num_processes: int) -> None:
    """Raise ConfigError if --dataloader_drop_last would leave no row of an evaluation."""
    a_round = data.per_device_eval_batch_size * num_processes
    if data.dataloader_drop_last and num_rows < a_round:
        raise ConfigError(
            f"--dataloader_drop_last leaves no batch of an evaluation: its documents fill {num_rows} rows, and a round "
            f"takes {a_round}; use a smaller --per_device_eval_batch_size, or leave it out."
        )


def best_fit(lengths: npt.NDArray[np.integer[Any]], size: int) -> Numbers:
    """
    Return the row of each document of a window, by best-fit decreasing: the fullest row that has room for it.

    `lengths` are 1 to `size`. Rows are numbered in the order of their longest documents, so how full and how many they
    are does not depend on their numbers.
    """
    row_of, opened_by = [0] * len(lengths), list[int]()
    with_room: dict[int, list[int]] = {}
    rooms = 0  # bit n: there is a row with room for n more tokens
    longest_first = np.argsort(-lengths, kind="stable")
    for place, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            rows = with_room[room]
            row = rows.pop()
            if not rows:
                rooms ^= 1 << room
        else:
            row, room = len(opened_by), size
            opened_by.append(place)
        row_of[place] = row
        if room - length >= SHORTEST:
            with_room.setdefault(room - length, []).append(row)
            rooms |= 1 << room - length
    number_of = np.empty(len(opened_by), dtype=np.int64)
    number_of[np.argsort(opened_by)] = np.arange(len(opened_by))
    return number_of[row_of]


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """
    Which documents each row holds: row i those of `documents` from `starts[i]` to `starts[i + 1]`.

    `digest` are 16 hexadecimal digits over the documents, their lengths, and the rows.
    """

    documents: Numbers
    starts: Numbers
    digest: str

    @classmethod
    def of(cls, lengths: npt.NDArray[np.integer[Any]], packing: Packing) -> RowPlan:
        """
        Return the plan of documents of these lengths: of these, the packing, and nothing else.

        Documents of one token or none are left out. Raises ConfigError for one that is longer than a row, and if none
        is left.
        """
        if len(lengths) > 0 and (longest := int(lengths.max())) > packing.max_length:
            raise _too_long(longest, packing, where=f"sample {int(lengths.argmax())}")
        order = np.arange(len(lengths), dtype=np.int64)
        if packing.seed is not None:
            generator = torch.Generator().manual_seed(packing.seed)
            order = torch.randperm(len(lengths), generator=generator).numpy()
        order = order[lengths[order] >= SHORTEST]
        if len(order) == 0:
            raise ConfigError("--packing: no sample has two tokens, of which the second could be predicted.")
        documents, counts = [], []
        for start in range(0, len(order), packing.window):
            window = order[start : start + packing.window]
            row_of = best_fit(lengths[window], packing.max_length)
            documents.append(window[np.argsort(row_of, kind="stable")])
            counts.append(np.bincount(row_of))
        in_rows, starts = np.concatenate(documents), np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        return cls(documents=in_rows, starts=starts, digest=_digest(in_rows, lengths[in_rows], starts))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Numbers:
        return self.documents[self.starts[row] : self.starts[row + 1]]


def _digest(*parts: npt.NDArray[np.integer[Any]]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _too_long(length: int, packing: Packing, *, where: str) -> ConfigError:
    return ConfigError(
        f"--packing: {where} has {length} tokens, and a row --max_length={packing.max_length}: give a larger one, or "
        "cut it."
    )


def row_of(documents: Sequence[Mapping[str, Any]]) -> Row:
    """
    Join samples to a row: their input_ids, positions from 0 in each, and as labels theirs, or else the input_ids.

    The first token of each is no target: what stands before it is another document.
    """
    ids = [np.asarray(each["input_ids"], dtype=np.int64) for each in documents]
    positions = [np.arange(len(each)) for each in ids]
    labels = [np.asarray(each.get("labels", own), dtype=np.int64) for each, own in zip(documents, ids, strict=True)]
    row = {"input_ids": ids, "position_ids": positions, "labels": labels}
    joined = {name: np.concatenate(parts) for name, parts in row.items()}
    joined["labels"][joined["position_ids"] == 0] = IGNORED
    return joined


def collate_rows(rows: Sequence[Row], *, max_length: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Return a batch of rows: input_ids, position_ids and labels, int64 of (rows, max_length), and no mask.

    Each token of padding is a document of its own, at position 0. So position 1 stands once in every document and
    nowhere else, by which `num_documents` and `num_tokens` count them.
    """
    padding = {"input_ids": pad_token_id, "position_ids": 0, "labels": IGNORED}
    batch = {name: np.full((len(rows), max_length), value, dtype=np.int64) for name, value in padding.items()}
    for i, row in enumerate(rows):
        for name, values in batch.items():
            values[i, : len(row[name])] = row[name]
    return {name: torch.from_numpy(values) for name, values in batch.items()}


class PackedRows(Dataset[Row]):
    """Rows of a data set with a length: planned once, of the lengths alone, and read when they are asked for."""

    def __init__(self, dataset: Any, packing: Packing) -> None:
        self.dataset = _read_columns(dataset)
        self.plan = RowPlan.of(lengths_of(self.dataset), packing)
        self.num_documents = len(self.plan.documents)
        self.described = f"{packing}, plan {self.plan.digest}"

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Row:
        return row_of([self.dataset[i] for i in self.plan[index].tolist()])

    def __getitems__(self, indices: list[int]) -> list[Row]:
        """Return rows, their documents read at once where the data set can do that."""
        rows = [self.plan[i].tolist() for i in indices]
        wanted = [document for row in rows for document in row]
        at_once = getattr(self.dataset, "__getitems__", None)
        read = iter(at_once(wanted) if at_once else [self.dataset[i] for i in wanted])
        return [row_of(list(islice(read, len(row)))) for row in rows]


def _read_columns(dataset: Any) -> Any:
    """Return a table of `datasets` with the columns that rows are made of alone. Raises ConfigError if it has none."""
    if not isinstance(dataset, class_if_loaded("datasets", "Dataset")) or dataset.format["type"] == "custom":
        return dataset
    if "input_ids" not in dataset.column_names:
        raise ConfigError(f"--packing: the data has no column input_ids, only: {', '.join(dataset.column_names)}.")
    return dataset.select_columns([name for name in ("input_ids", "labels") if name in dataset.column_names])


def lengths_of(dataset: Any) -> npt.NDArray[np.integer[Any]]:
    """
    Return the number of tokens of each sample; of a table without reading the samples.

    Raises ConfigError for samples without input_ids. The generators are left as they are.
    """
    try:
        with rng.seeded(0):
            return measure(dataset, ("input_ids",), column="")[:, 0]
    except (ValueError, IndexError) as error:
        raise ConfigError(f"--packing: {error}, which rows are made of.") from error


class PackedStream(IterableDataset[Row]):
    """
    Rows of a stream: it reads a window of documents, and gives its rows.

    The state is that of the stream at the window's beginning and how many of its rows were given, so a resume reads one
    window again. In a worker it packs what that worker reads. `num_documents` are those of the rows that this process
    has given since an iteration began.
    """

    def __init__(self, stream: Any, packing: Packing) -> None:
        self.stream, self.packing = stream, replace(packing, seed=None)
        self.described = str(packing)
        self.num_documents = 0
        self._start: Mapping[str, Any] | None = None
        self._state: dict[str, Any] | None = None
        self._beginning: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last row."""
        return {"documents": self._first_state(), "rows": 0} if self._state is None else dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration there."""
        self._start = state

    def _first_state(self) -> Any:
        if self._beginning is None:
            # A stream of `datasets` builds its state when it is read: an empty state is the beginning.
            built_when_read = isinstance(self.stream, class_if_loaded("datasets", "IterableDataset"))
            self._beginning = {} if built_when_read else self._now()
        return self._beginning

    def _now(self) -> Any:
        return self.stream.state_dict() if hasattr(self.stream, "state_dict") else None

    def __iter__(self) -> Iterator[Row]:
        start, self._start = self._start, None
        self.num_documents = 0
        place, given = self._first_state(), 0
        if start is not None:
            place, given = start["documents"], start["rows"]
            self.stream.load_state_dict(place)
        documents = iter(self.stream)
        while window := list(islice(documents, self.packing.window)):
            for number, row in enumerate(self._rows(window), start=1):
                if number > given:
                    self._state = {"documents": place, "rows": number}
                    self.num_documents += int((row["position_ids"] == 0).sum())
                    yield row
            place, given = self._now(), 0

    def _rows(self, window: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
        lengths = np.asarray([len(document["input_ids"]) for document in window])
        if not (lengths >= SHORTEST).any():
            return
        if (longest := int(lengths.max())) > self.packing.max_length:
            raise _too_long(longest, self.packing, where="a sample of the stream")
        plan = RowPlan.of(lengths, self.packing)
        for number in range(len(plan)):
            yield row_of([window[i] for i in plan[number]])


def packed(dataset: Any, packing: Packing) -> Samples:
    """Return the rows of a data set, or of a stream, and their collator. Raises ConfigError."""
    collate: Callable[..., Any] = partial(
        collate_rows, max_length=packing.max_length, pad_token_id=packing.pad_token_id
    )
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return Samples(dataset=PackedStream(dataset, packing), collate=collate)
    return Samples(dataset=PackedRows(dataset, packing), collate=collate)
