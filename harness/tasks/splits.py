"""The splits of the data: where each came from, its columns, what is held out, how it is prepared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from harness.errors import ConfigError
from harness.tasks.arrow_cache import one_at_a_time
from harness.tasks.delimited import cells_of, is_number
from harness.tasks.flags import TaskConfig

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """
    A part of the data: its name, its rows (mostly of `datasets`) and the flag that it came from, for messages.

    `is_delimited` says that it was read from csv or tsv, where numbers are texts too.
    """

    name: str
    rows: Any
    source: str
    is_delimited: bool = False

    @property
    def columns(self) -> list[str]:
        """The names of the columns; a stream may know them from its first row only."""
        return list(self.rows.column_names or self.first_row())

    @property
    def string_columns(self) -> list[str]:
        """
        The columns of strings, judged by the features or, in a stream without, by its first row.

        Of delimited files those with a cell that is neither a number nor true or false.
        """
        if self.rows.features is not None:
            kinds = {name: getattr(feature, "dtype", None) for name, feature in self.rows.features.items()}
            names = [name for name, kind in kinds.items() if kind in ("string", "large_string", "string_view")]
            if not self.is_delimited:
                return names
            return [name for name in names if any(_is_word(cell) for cell in cells_of(self.rows, name))]
        return [name for name, value in self.first_row().items() if isinstance(value, str)]

    def first_row(self) -> dict[str, Any]:
        """Return the first row. Raises ConfigError if there is none, or if a stream is malformed there."""
        return self._first(f"{self.source} holds no rows; give data with at least one.")

    def require_samples(self, reason: str) -> None:
        """Raise ConfigError, with the `reason`, if preparation left no sample."""
        self._first(f"{self.source}: {reason}")

    def require_columns(self, flag: str, *names: str) -> None:
        """Raise ConfigError, which lists the columns, for names in the flag that are no columns of the data."""
        present = self.columns
        for name in names:
            if name not in present:
                raise ConfigError(f"--{flag}: {self.source} has no column {name!r}; its columns: {', '.join(present)}.")

    def transform(self, function: Callable[[Any], Any], config: TaskConfig, *, keep_columns: bool = False) -> Split:
        """
        Apply a function to batches of rows: cached on disk, or lazily in a stream. Its result replaces the rows.

        With `keep_columns` it replaces only the columns of the same names. The function should be a closure: `datasets`
        then hashes its code and the values it uses into the cache's key, so let it use single values instead of all
        flags. Of an importable function only the name is hashed, so a changed one would find old results. One process
        at a time prepares, the others find its result.
        """
        remove = [] if keep_columns else self.columns
        if isinstance(self.rows, datasets.IterableDataset):
            return replace(self, rows=self.rows.map(function, batched=True, remove_columns=remove))
        with _one_at_a_time(self.rows, function.__name__):
            rows = self.rows.map(
                function,
                batched=True,
                remove_columns=remove,
                num_proc=config.preprocessing_num_workers,
                load_from_cache_file=not config.overwrite_cache,
            )
        return replace(self, rows=rows)

    def cut(self, config: TaskConfig) -> Split:
        """Return as many rows as the --max_*_samples flag of this part says, all without it."""
        limits = {"train": config.max_train_samples, "test": config.max_predict_samples}
        limit = limits.get(self.name, config.max_eval_samples)
        if limit is None:
            return self
        if isinstance(self.rows, datasets.IterableDataset):
            return replace(self, rows=self.rows.take(limit))
        return replace(self, rows=self.rows.select(range(min(limit, len(self.rows)))))

    def _first(self, refusal: str) -> dict[str, Any]:
        with user_data(self.source):
            row = next(iter(self.rows), None)
        if row is None:
            raise ConfigError(refusal)
        return dict(row)


class Splits(dict[str, Split]):
    """The parts of the data by name: "train", "validation", "test" where they exist, others under their own names."""

    @property
    def known(self) -> list[Split]:
        """Return those of the three names that exist, in their order."""
        return [self[name] for name in SPLITS if name in self]

    @property
    def labelled(self) -> list[Split]:
        """Return those whose labels are read: all known ones but that to predict on."""
        return [split for split in self.known if split.name != "test"]

    def rows(self, name: str) -> Any:
        """Return the rows of a part; None if it does not exist."""
        return self[name].rows if name in self else None

    def to_learn_labels(self, flag: str = "train_file") -> Split:
        """Return the training data. Raises ConfigError, which suggests the `flag`, if there is none."""
        if "train" not in self:
            raise ConfigError(f"No training data to learn the labels from; give --{flag} or --dataset_name.")
        return self["train"]

    def map(self, function: Callable[[Split], Split], *further: str) -> Splits:
        """Apply a function to each of the three parts that exists, and to `further` ones; others are left out."""
        return Splits({name: function(self[name]) for name in (*SPLITS, *further) if name in self})

    def cut(self, config: TaskConfig) -> Splits:
        """Return each part with as many rows as its --max_*_samples flag says."""
        return Splits({name: split.cut(config) for name, split in self.items()})

    def hold_out(self, config: TaskConfig, *, shuffled: bool = False) -> Splits:
        """
        Split --validation_split_percentage of the training rows off as "validation" if there is none.

        The first rows are taken, as run_clm does, or `shuffled` ones where their order may follow the label. A stream
        and a single row can't be split and stay whole.
        """
        train = self.rows("train")
        if train is None or "validation" in self or config.streaming or len(train) < 2:
            return self
        held = max(1, round(len(train) * config.validation_split_percentage / 100))
        if shuffled:
            # A fixed seed: the parts are the same whatever --seed a run has.
            train = train.shuffle(seed=0)
        validation = replace(self["train"], name="validation", rows=train.select(range(held)))
        remaining = replace(self["train"], rows=train.select(range(held, len(train))))
        return Splits({**self, "validation": validation, "train": remaining})

    def label_column(self, config: TaskConfig) -> str:
        """Return the column of --label_column_name, else `label` or `labels`. Raises ConfigError if it is missing."""
        train = self["train"]
        column = config.label_column_name or next((name for name in ("label", "labels") if name in train.columns), None)
        if column is None:
            raise ConfigError(
                f"{train.source} has no column `label` or `labels`, only: {', '.join(train.columns)}; name one by "
                "--label_column_name."
            )
        for split in self.labelled:
            split.require_columns("label_column_name", column)
        return column

    def text_columns(self, config: TaskConfig) -> list[str]:
        """
        Return the columns to read as one text: --text_column_names, else `text`, else the first column of strings.

        Raises ConfigError for a name that one of the splits lacks, and if no column holds strings.
        """
        first = self.known[0]
        strings = first.string_columns
        columns = column_names(config) or (["text"] if "text" in strings else strings[:1])
        if not columns:
            present = ", ".join(first.columns)
            raise ConfigError(
                f"{first.source} has no column of strings, only: {present}; name one by --text_column_names."
            )
        for split in self.known:
            split.require_columns("text_column_names", *columns)
        return columns


def column_names(config: TaskConfig) -> list[str]:
    """Return the names that --text_column_names lists."""
    return [name.strip() for name in (config.text_column_names or "").split(",") if name.strip()]


def texts_of(batch: Mapping[str, Sequence[Any]], columns: Sequence[str], delimiter: str) -> list[str]:
    """
    Join the columns of a batch to one text a row; an empty cell counts as an empty text.

    Raises ConfigError for values that are no texts.
    """
    texts = [["" if value is None else as_text(value, column) for value in batch[column]] for column in columns]
    return [delimiter.join(row) for row in zip(*texts, strict=True)]


def as_text(value: Any, column: str) -> str:
    """
    Return a text, or a whole number as it is written.

    Raises ConfigError for any other value: how Python writes it is nothing to train on.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    raise ConfigError(
        f"Column {column!r} holds {shown}, of type {type(value).__name__}, where a text is needed; write it as the "
        "text that the model is to read (of chat messages: by the tokenizer's chat template), or name another column "
        "by --text_column_names."
    )


def require_tokens(samples: Mapping[str, Sequence[Sequence[int]]], *texts: Sequence[Any]) -> None:
    """Raise ConfigError for a sample without any token, of which a model computes nothing or NaN."""
    masks = samples.get("attention_mask") or [[1] * len(ids) for ids in samples["input_ids"]]
    for mask, *sources in zip(masks, *texts, strict=True):
        if not any(mask):
            shown = ", ".join(repr(source) for source in sources)
            raise ConfigError(f"There is a row whose text has no token ({shown}); remove it, or give it a text.")


def grouped(tokens: Mapping[str, Sequence[Sequence[int]]], size: int) -> dict[str, list[list[int]]]:
    """Join a batch of token lists, cut it into pieces of `size`, and drop the rest of the batch."""
    lines = {name: list(itertools.chain.from_iterable(values)) for name, values in tokens.items()}
    return {
        name: [line[start : start + size] for start in range(0, len(line) - size + 1, size)]
        for name, line in lines.items()
    }


def _is_word(cell: str) -> bool:
    return not is_number(cell) and cell.strip().lower() not in ("true", "false")


@contextmanager
def user_data(source: str) -> Iterator[None]:
    """Turn what `datasets` raises for data it can't find or read into ConfigError; use it around one call."""
    try:
        yield
    except (DatasetGenerationError, OSError, ValueError) as error:
        # DatasetGenerationError says only that there was an error; its cause says which.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        if "corresponds to no data" in reason[0] or "BatchSize must be greater than 0, got 0" in reason[0]:
            raise ConfigError(f"{source} holds no rows; give data with at least one.") from error
        raise ConfigError(f"{source} can't be read: {reason[0]}") from error


def _one_at_a_time(dataset: Any, name: str) -> AbstractContextManager[bool]:
    """Wait while another process applies this to the data; without a cache on disk each process prepares its own."""
    if not dataset.cache_files:
        return nullcontext(False)
    return one_at_a_time(Path(dataset.cache_files[0]["filename"]).parent / f"{dataset._fingerprint}-{name}.lock")
