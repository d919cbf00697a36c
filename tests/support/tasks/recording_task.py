"""The parity task without dropout, whose samples carry a number: the model writes down those of each micro-batch."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from harness.tasks import Task, TaskConfig
from tests.support.tasks import parity_task

# A folder; it is no argument of the run, since arguments may not change between its attempts.
VARIABLE = "RECORD_SAMPLES_IN"


class Numbered(Dataset):  # type: ignore[type-arg]
    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.samples[index], "ids": torch.tensor(index)}


class Recording(GPT2LMHeadModel):
    # Named, so that no column is taken for unused.
    def forward(self, input_ids: Any, attention_mask: Any, labels: Any, ids: Any = None, **kwargs: Any) -> Any:
        if self.training:
            path = Path(os.environ[VARIABLE]) / f"rank-{os.environ.get('RANK', '0')}"
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(ids.tolist()) + "\n")
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {**parity_task.collate(samples), "ids": torch.stack([sample["ids"] for sample in samples])}


def build(config: TaskConfig) -> Task:
    task = parity_task.build(config)
    shape = {"vocab_size": parity_task.VOCABULARY, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = Recording(GPT2Config(**shape, **rates, bos_token_id=0, eos_token_id=0))
    train = Numbered(task.train_dataset) if hasattr(task.train_dataset, "__len__") else _numbered(task.train_dataset)
    return replace(task, model=model, train_dataset=train, data_collator=collate)


def _numbered(stream: Any) -> Any:
    rows = [{name: value.tolist() for name, value in sample.items()} | {"ids": i} for i, sample in enumerate(stream)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset().with_format("torch")


def recorded(folder: Path, ranks: int) -> list[list[list[int]]]:
    """The sample numbers by rank and micro-batch."""
    return [
        [json.loads(line) for line in (folder / f"rank-{rank}").read_text(encoding="utf-8").splitlines()]
        for rank in range(ranks)
    ]
