"""Scores of generated texts: ROUGE of rouge-score and BLEU of sacrebleu, from sums, in O(1) memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from harness.errors import ConfigError

ROUGE = ("rouge1", "rouge2", "rougeL")


class TextScores:
    """
    ROUGE (mean F-measure, with stemming), corpus BLEU and the mean number of generated tokens, `gen_len`.

    ROUGE and BLEU are from 0 to 100, as in Transformers' run_summarization and run_translation. Raises ConfigError
    where a library is not installed.
    """

    names: tuple[str, ...] = (*ROUGE, "bleu", "gen_len")

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from sacrebleu.metrics import BLEU
        except ImportError as error:
            raise ConfigError(
                f"--predict_with_generate needs a package that is not installed ({error.name}): "
                "pip install rouge-score sacrebleu."
            ) from error
        self._rouge = RougeScorer(list(ROUGE), use_stemmer=True)
        self._bleu = BLEU(effective_order=True)  # effective_order does not change the counts
        self._sums = dict.fromkeys(ROUGE, 0.0)
        self._right, self._all = [0] * self._bleu.max_ngram_order, [0] * self._bleu.max_ngram_order  # n-grams
        self._lengths = [0, 0]  # words generated, words expected
        self._num_tokens = self._num_texts = 0

    def predictions(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return generated tokens, (batch, length), as they are."""
        tokens: torch.Tensor = logits
        return tokens

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch of texts, as tokens of (batch, length) each; -100 is padding."""
        generated = decoded(predictions.tolist(), self._tokenizer)
        for text, expected in zip(generated, decoded(labels.tolist(), self._tokenizer), strict=True):
            for name, score in self._rouge.score(expected, text).items():
                self._sums[name] += score.fmeasure
            counts = self._bleu.sentence_score(text, [expected])
            self._right = [a + b for a, b in zip(self._right, counts.counts, strict=True)]
            self._all = [a + b for a, b in zip(self._all, counts.totals, strict=True)]
            self._lengths = [self._lengths[0] + counts.sys_len, self._lengths[1] + counts.ref_len]
        padding = (predictions == -100) | (predictions == self._tokenizer.pad_token_id)
        self._num_tokens += int((~padding).sum())
        self._num_texts += len(predictions)

    def compute(self) -> dict[str, float]:
        """Return the scores; NaN where there was no text."""
        if not self._num_texts:
            return dict.fromkeys(self.names, math.nan)
        bleu = self._bleu.compute_bleu(self._right, self._all, *self._lengths, smooth_method="exp")
        rouge = {name: 100 * total / self._num_texts for name, total in self._sums.items()}
        return {**rouge, "bleu": float(bleu.score), "gen_len": self._num_tokens / self._num_texts}


def decoded(rows: Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    """Return the texts of rows of tokens, without special tokens and padding (-100 too), stripped."""
    texts = tokenizer.batch_decode([[token for token in row if token >= 0] for row in rows], skip_special_tokens=True)
    return [text.strip() for text in texts]
