"""Texts as documents: they stay apart, long ones in pieces, and a batch is padded to its longest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.tasks import Task, TaskConfig
from harness.tasks.pretrained import load_tokenizer
from harness.tasks.text import causal_lm
from tests.support.inputs import TINY_GPT, save_gpt_tokenizer, write_rows

TEXTS = ["the old cat", "a", "", "the red dog sat on the hill and on the mat"]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "config_overrides": TINY_GPT,
        "tokenizer_name": str(save_gpt_tokenizer(tmp_path / "tokenizer")),
        "train_file": str(write_rows(tmp_path / "train.csv", [{"text": text} for text in TEXTS])),
        "validation_file": str(tmp_path / "train.csv"),
        "max_length": 5,
    }


def documents(task: Task) -> list[list[int]]:
    return [sample["input_ids"] for sample in task.train_dataset]


def test_texts_stay_apart_and_long_ones_are_cut_into_pieces(given: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(TaskConfig(**given))
    tokens = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert len(tokens[1]) == 1
    assert len(tokens[3]) > 10
    pieces = [ids[start : start + 5] for ids in tokens for start in range(0, len(ids), 5)]
    pieces = [ids for ids in pieces if len(ids) > 1]
    assert documents(causal_lm.build(TaskConfig(**given))) == pieces
    assert documents(causal_lm.build(TaskConfig(**given, max_train_samples=2))) == pieces[:2]


def test_append_eos_ends_each_text_and_not_each_piece(given: dict[str, Any]) -> None:
    end = load_tokenizer(TaskConfig(**given)).eos_token_id
    found = documents(causal_lm.build(TaskConfig(**given, append_eos=True)))
    assert sum(ids[-1] == end for ids in found) == 3, "that of the empty text alone is no document"
    assert not any(end in ids[:-1] for ids in found)


def test_a_stream_has_the_same_documents(given: dict[str, Any]) -> None:
    whole, stream = (causal_lm.build(TaskConfig(**given, streaming=streaming)) for streaming in (False, True))
    assert documents(stream) == documents(whole)


def test_a_batch_is_padded_behind_its_documents_and_padding_is_no_target(given: dict[str, Any]) -> None:
    task = causal_lm.build(TaskConfig(**given))
    batch = task.data_collator([{"input_ids": [7, 8, 9]}, {"input_ids": [5, 6]}])
    padding = task.processing_class.eos_token_id
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 6, padding]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 9], [-100, 6, -100]], "nothing stands before the first token"
    assert {value.dtype for value in batch.values()} == {torch.int64}
