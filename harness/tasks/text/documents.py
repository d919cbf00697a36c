"""Texts as documents of their own: tokens of each, cut where it is too long, and padded in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from harness.tasks.flags import TaskConfig
from harness.tasks.splits import Split

IGNORED = -100


def documents(split: Split, config: TaskConfig, tokenised: Callable[[Any], dict[str, Any]], size: int) -> Split:
    """
    Return input_ids of each text, up to `size` tokens; a longer one in pieces, each a document.

    A piece of a single token is left out: there is nothing to predict in it. Raises ConfigError if none is left.
    """

    def cut_to_documents(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        texts = tokenised(batch)["input_ids"]
        pieces = [ids[start : start + size] for ids in texts for start in range(0, len(ids), size)]
        return {"input_ids": [ids for ids in pieces if len(ids) > 1]}

    found = split.transform(cut_to_documents, config)
    found.require_samples("no text of two tokens or more, of which the second could be predicted; give more text.")
    return found


def pad(samples: Sequence[Mapping[str, Any]], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Return a batch of documents, padded to the longest: input_ids, attention_mask and labels, int64 of (batch, n).

    The first token of each is no target: nothing stands before it. Models whose loss counts all labels would count it.
    """
    ids = [torch.as_tensor(sample["input_ids"], dtype=torch.int64) for sample in samples]
    columns = {
        "input_ids": (ids, pad_token_id),
        "attention_mask": ([torch.ones_like(each) for each in ids], 0),
        "labels": (ids, IGNORED),
    }
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)
        for name, (values, value) in columns.items()
    }
    batch["labels"][:, 0] = IGNORED
    return batch
