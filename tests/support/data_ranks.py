"""
What ranks read and score: `torchrun --nproc_per_node 2 -m tests.support.data_ranks FOLDER`.

Each rank writes FOLDER/rank-R.json, what `found_on` gives.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator

from harness.data.by_tokens import TokenLimit
from harness.data.flags import DataConfig
from harness.data.lengths import LengthGroups
from harness.data.loader import TrainLoader
from harness.data.samples import Samples, build_eval_loader, usable_samples
from harness.distributed.ranks import settle
from harness.tasks import TaskConfig
from harness.training.evaluation import EvalSet, Evaluator
from harness.training.flags import ModelingConfig
from harness.training.loss import Loss
from harness.training.weighing import Repeated
from tests.support.tasks import parity_task, recording_task

SIZES, BATCH_SIZES, KINDS = (7, 8, 13), (1, 2, 4), ("map", "stream", "grouped")
CASES = [
    *((kind, *values, 0) for kind, *values in itertools.product(KINDS, SIZES, BATCH_SIZES, (False, True))),
    ("stream", 13, 2, False, 2),  # each worker ends with a batch that is not full
    # Batches by tokens: on two ranks an odd number to train on, and a last one to evaluate that is uneven, or not.
    *(("tokens", size, 1, False, workers) for size, workers in itertools.product(SIZES, (0, 1))),
]
MAX_TOKENS = 70


class Seen:
    """A metric that writes down what it is given: the exact samples, whatever is filled up."""

    names = ("accuracy",)

    def __init__(self) -> None:
        self.accuracy = parity_task.TokenAccuracy()
        self.labels: list[list[int]] = []

    def predictions(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.accuracy.predictions(logits, labels)

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        self.accuracy.update(predictions, labels)
        self.labels += [[int(token) for token in row if token != -100] for row in labels]

    def compute(self) -> dict[str, float]:
        return self.accuracy.compute()


def data(kind: str, size: int) -> Any:
    samples = parity_task.VariableLength(size, seed=5)
    if kind == "stream":
        rows = [
            {name: value.tolist() for name, value in sample.items()} | {"ids": i} for i, sample in enumerate(samples)
        ]
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2).with_format("torch")
    return recording_task.Numbered(samples)


def found_on(accelerator: Accelerator) -> dict[str, Any]:
    """Collective: by case the samples of each training batch of two epochs, none repeated, and of an evaluation."""
    torch.manual_seed(0)
    model = recording_task.build(TaskConfig()).model
    model.config.use_cache = False
    loss = Loss(model, ModelingConfig(), accelerator, None)
    found: dict[str, Any] = {"world": accelerator.num_processes, "trained": {}, "evaluated": {}}
    for kind, size, batch_size, drop_last, workers in CASES:
        config = DataConfig(
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            dataloader_drop_last=drop_last,
            dataloader_num_workers=workers,
            train_sampling_strategy="group_by_length" if kind == "grouped" else "random",
        )
        case = f"{kind}, {size} samples, {batch_size} a batch, drop_last {drop_last}, {workers} workers"

        def samples(seed: int | None, kind: str = kind, size: int = size, config: DataConfig = config) -> Samples:
            groups: LengthGroups | TokenLimit | None = None
            if kind == "grouped":
                groups = LengthGroups(size=2, input_name="input_ids", seed=seed)
            elif kind == "tokens":
                ranks = 1 if seed is None else accelerator.num_processes
                groups = TokenLimit(max_tokens=MAX_TOKENS, names=("input_ids",), seed=3, num_ranks=ranks)
            return usable_samples(data(kind, size), recording_task.collate, model, config, group=groups)

        torch.manual_seed(accelerator.process_index)  # ranks draw differently after some dropout
        loader = TrainLoader(samples(None), config, accelerator, seed=3)
        found["trained"][case] = [
            [[] if isinstance(batch, Repeated) else batch["ids"].tolist() for batch in loader.epoch(epoch)]
            for epoch in (0, 1)
        ]
        seen = Seen()
        evaluator = Evaluator(
            accelerator,
            loss=loss,
            metrics=lambda seen=seen: seen,  # type: ignore[misc]
            generate=None,
            drops_non_finite=False,
        )
        prepared = build_eval_loader(samples(3), config, accelerator)
        outcome = evaluator.run(model, EvalSet(prefix="eval", loader=prepared, batch_size=batch_size))
        accuracy = outcome.metrics.get("eval_accuracy")
        found["evaluated"][case] = {
            "labels": seen.labels,
            "accuracy": accuracy,
            "loss": outcome.metrics.get("eval_loss"),
            **outcome.extras,
        }
    return found


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    found = found_on(accelerator)
    (folder / f"rank-{accelerator.process_index}.json").write_text(json.dumps(found), encoding="utf-8")
    accelerator.wait_for_everyone()
    settle()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
