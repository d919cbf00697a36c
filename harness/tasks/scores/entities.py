"""Scores of named entities: the numbers of seqeval's default mode, from counts, in O(1) memory."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

IGNORED = -100
KINDS = "OBIES."  # a tag's first letter; any other letter counts as one more kind


class EntityScores:
    """
    Precision, recall and F1 of whole entities over all types (micro), and the accuracy of tokens.

    Entities are found as seqeval's default mode finds them in IOB and IOBES tags: an I- after an O begins one, and a
    change of type ends one. Tokens whose label is -100 are left out, as if they weren't there.
    """

    names: tuple[str, ...] = ("precision", "recall", "f1", "accuracy")

    def __init__(self, tags: Sequence[str]) -> None:
        kinds, types = [*map(_kind, tags), 0], [*map(_type, tags), "_"]  # the last is an O that separates samples
        order = {name: index for index, name in enumerate(dict.fromkeys(types))}
        self._outside = len(tags)
        self._kinds = torch.tensor(kinds)
        self._types = torch.tensor([order[name] for name in types])
        self._counts: torch.Tensor | None = None  # correct, predicted and expected entities; correct tokens, tokens

    def predictions(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Reduce (batch, length, tags) to the likeliest tag, (batch, length)."""
        first: torch.Tensor = logits[0] if isinstance(logits, (tuple, list)) else logits
        return first.argmax(dim=-1)

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch of tags, (batch, length) each."""
        counted = torch.nn.functional.pad(labels != IGNORED, (0, 1), value=True)
        expected, predicted = (
            torch.nn.functional.pad(tags, (0, 1), value=self._outside)[counted] for tags in (labels, predictions)
        )
        num_tokens = counted.sum() - len(labels)
        right_tokens = (expected == predicted).sum() - len(labels)
        (ends, begins, types), (their_ends, their_begins, their_types) = map(self._entities, (expected, predicted))
        right = ends & their_ends & (begins == their_begins) & (types == their_types)
        counts = torch.stack([right.sum(), their_ends.sum(), ends.sum(), right_tokens, num_tokens])
        self._counts = counts if self._counts is None else self._counts + counts

    def compute(self) -> dict[str, float]:
        """Return the scores; NaN where no token counted, 0 where there is no entity to count."""
        right, predicted, expected, right_tokens, num_tokens = (
            [0] * 5 if self._counts is None else self._counts.tolist()
        )
        if not num_tokens:
            return dict.fromkeys(self.names, math.nan)
        return {
            "precision": right / predicted if predicted else 0.0,
            "recall": right / expected if expected else 0.0,
            "f1": 2 * right / (predicted + expected) if predicted + expected else 0.0,
            "accuracy": right_tokens / num_tokens,
        }

    def _entities(self, tags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Return for each place of a sequence (tokens,): whether an entity ends before it, where that began, its type.

        The rules are end_of_chunk and start_of_chunk of seqeval/metrics/sequence_labeling.py.
        """
        before = torch.nn.functional.pad(tags[:-1], (1, 0), value=self._outside)
        kinds, types = self._kinds.to(tags.device), self._types.to(tags.device)
        (kind, last), (type_, last_type) = (kinds[tags], kinds[before]), (types[tags], types[before])
        changes = type_ != last_type
        ends = _among(last, "ES") | (_among(last, "BI") & _among(kind, "BSO")) | (~_among(last, "O.") & changes)
        starts = _among(kind, "BS") | (_among(last, "ESO") & _among(kind, "EI")) | (~_among(kind, "O.") & changes)
        places = torch.arange(len(tags), device=tags.device)
        begins = torch.where(starts, places, 0).cummax(dim=0).values
        return ends, torch.nn.functional.pad(begins[:-1], (1, 0)), last_type


def are_of_entities(tags: Sequence[str]) -> bool:
    """Whether tags say where entities begin and end: `O`, and B-, I-, E- or S- with a type."""
    return all(tag == "O" or re.match("[BIES]-.", tag) for tag in tags) and any(tag != "O" for tag in tags)


def _kind(tag: str) -> int:
    return KINDS.find(tag[:1]) % (len(KINDS) + 1)  # -1, for any other letter, becomes the last kind


def _type(tag: str) -> str:
    return tag[1:].split("-", maxsplit=1)[-1] or "_"


def _among(kinds: torch.Tensor, letters: str) -> torch.Tensor:
    return torch.stack([kinds == KINDS.index(letter) for letter in letters]).any(dim=0)
