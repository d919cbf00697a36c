"""A task that needs no library of data. Its model notes in a file what is imported at each of its steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate
from transformers import GPT2Config, GPT2LMHeadModel

from harness.tasks import Task, TaskConfig


class Noting(GPT2LMHeadModel):
    file: Path

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        self.file.write_text(" ".join(sorted({name.partition(".")[0] for name in sys.modules})), encoding="utf-8")
        return super().forward(input_ids, labels=labels)


def build(config: TaskConfig) -> Task:
    model = Noting(GPT2Config(vocab_size=8, n_positions=4, n_embd=8, n_layer=1, n_head=1))
    model.file = Path((config.task_args or {})["file"])
    ids = torch.arange(64).reshape(16, 4) % 8
    samples = [{"input_ids": row, "labels": row} for row in ids]
    return Task(model=model, train_dataset=samples, eval_dataset=samples[:2], data_collator=default_collate)
