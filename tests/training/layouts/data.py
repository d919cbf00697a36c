"""Samples of unequal length made up on the spot: each depends on its number and the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCABULARY, CLASSES, SHORTEST, LONGEST = 48, 3, 4, 13
MASK, IGNORED = 1, -100
Sample = dict[str, torch.Tensor]
Make = Callable[[torch.Generator], Sample]


def samples(make: Make, size: int, seed: int) -> list[Sample]:
    return [make(torch.Generator().manual_seed(1000 * seed + number)) for number in range(size)]


def _tokens(dice: torch.Generator) -> torch.Tensor:
    length = int(torch.randint(SHORTEST, LONGEST, (1,), generator=dice))
    return torch.randint(2, VOCABULARY, (length,), generator=dice)


def _chosen(tokens: torch.Tensor, share: float, dice: torch.Generator) -> torch.Tensor:
    """A mask of some positions, at least one."""
    chosen = torch.rand(tokens.shape, generator=dice) < share
    chosen[int(torch.randint(0, len(tokens), (1,), generator=dice))] = True
    return chosen


def text(dice: torch.Generator) -> Sample:
    """To be continued; the labels of the beginning are left out, as a prompt's are."""
    tokens = _tokens(dice)
    labels = tokens.clone()
    labels[: int(torch.randint(0, len(tokens) - 2, (1,), generator=dice))] = IGNORED
    return {"input_ids": tokens, "labels": labels}


def masked(dice: torch.Generator) -> Sample:
    """Masked once, whatever the batch: the collator of masked-lm draws for a batch, and so for the layout."""
    tokens = _tokens(dice)
    hidden = _chosen(tokens, 0.3, dice)
    return {"input_ids": torch.where(hidden, MASK, tokens), "labels": torch.where(hidden, tokens, IGNORED)}


def pair(dice: torch.Generator) -> Sample:
    return {"input_ids": _tokens(dice), "labels": _tokens(dice)}


def tagged(dice: torch.Generator) -> Sample:
    tokens = _tokens(dice)
    return {"input_ids": tokens, "labels": torch.where(_chosen(tokens, 0.5, dice), tokens % CLASSES, IGNORED)}


def classed(dice: torch.Generator) -> Sample:
    tokens = _tokens(dice)
    return {"input_ids": tokens, "labels": tokens[0] % CLASSES}


def several(dice: torch.Generator) -> Sample:
    tokens = _tokens(dice)
    return {"input_ids": tokens, "labels": torch.stack([(tokens[i] % 2).float() for i in range(CLASSES)])}


def measured(dice: torch.Generator) -> Sample:
    tokens = _tokens(dice)
    return {"input_ids": tokens, "labels": tokens.float().mean() / VOCABULARY}


def asked(dice: torch.Generator) -> Sample:
    """Of one length: BERT looks for an answer in the padding too, so a sample's loss depends on the batch's longest."""
    tokens = torch.randint(2, VOCABULARY, (LONGEST,), generator=dice)
    start = torch.randint(0, LONGEST - 1, (1,), generator=dice)[0]
    return {"input_ids": tokens, "start_positions": start, "end_positions": start + 1}


def image(dice: torch.Generator) -> Sample:
    label = torch.randint(0, CLASSES, (1,), generator=dice)[0]
    return {"pixel_values": torch.randn(3, 8, 8, generator=dice) + label, "labels": label}


def collate(batch: list[Sample]) -> dict[str, Any]:
    """Pad token sequences to the batch's longest, stack all else."""
    found: dict[str, torch.Tensor] = {}
    for name in batch[0]:
        values = [sample[name] for sample in batch]
        if name == "input_ids" or (name == "labels" and values[0].dim() == 1 and not values[0].is_floating_point()):
            padding = IGNORED if name == "labels" else 0
            found[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
        else:
            found[name] = torch.stack(values)
    return {**found, "attention_mask": (found["input_ids"] != 0).long()} if "input_ids" in found else found


def collate_reversed(batch: list[Sample]) -> dict[str, Any]:
    """The same samples the other way round: sums differ in their last bits, and nothing else does."""
    return collate(batch[::-1])
