"""
An evaluation with metrics over a vocabulary of 50,000 words: its memory as sequences become more, and its time. Linux.

Each way evaluates in a process of its own, first one batch and then all sequences: the memory is what the largest
resident size grows by, the time is `eval_runtime`. The Trainer keeps all logits for `compute_metrics`, 1.6 MB a
sequence, unless `preprocess_logits_for_metrics` makes them fewer, as in the example script run_clm.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from harness.config import Json
from harness.tasks import Task, TaskConfig
from harness.tasks.scores.classification import TokenAccuracy
from harness.train import main as harness
from tests.benchmarks.contest import OURS, Bound, Curve, Result, alternate, in_process

WORDS, LENGTH, BATCH = 50_000, 8, 25
COUNTS = (100, 200, 400)


def build(config: TaskConfig) -> Task:
    """`sequences` of random words, repeated so that there is something to predict, and a small GPT-2."""
    count = (config.task_args or {})["sequences"]
    words = torch.randint(0, WORDS, (count, 1), generator=torch.Generator().manual_seed(0)).expand(count, LENGTH)
    samples = [{"input_ids": row, "labels": row} for row in words]
    shape = GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=1, n_head=2, n_positions=LENGTH)
    model = GPT2LMHeadModel(shape)
    model.transformer.wte.weight.data.mul_(20)  # then the likeliest word is often the last one
    return Task(
        model=model,
        train_dataset=samples,
        eval_dataset=samples,
        data_collator=torch.utils.data.default_collate,
        metrics=lambda: TokenAccuracy(shift=1),
    )


def with_harness(sequences: int, folder: Path) -> dict[str, float]:
    argv = ["--task=tests.benchmarks.evaluation:build", f'--task_args={{"sequences": {sequences}}}', "--do_eval"]
    argv += [f"--output_dir={folder}", f"--per_device_eval_batch_size={BATCH}", "--report_to=none", "--use_cpu"]
    if (code := harness([*argv, "--disable_tqdm=true"])) != 0:
        raise SystemExit(code)
    found: dict[str, float] = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return found


def with_trainer(sequences: int, folder: Path, *, reduces: bool) -> dict[str, float]:
    """As transformers' example script run_clm; without its `preprocess_logits_for_metrics` all logits are kept."""
    set_seed(42)
    task = build(TaskConfig(task="tests.benchmarks.evaluation:build", task_args=Json({"sequences": sequences})))

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        words = prediction.predictions if reduces else prediction.predictions.argmax(-1)
        return {"accuracy": float((words[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=BATCH,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        task.model,
        arguments,
        data_collator=task.data_collator,
        eval_dataset=task.eval_dataset,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=(lambda logits, _: logits.argmax(dim=-1)) if reduces else None,
    )
    found: dict[str, float] = trainer.evaluate()
    return found


KEEPS, REDUCES = "Trainer", "Trainer, logits reduced"
WAYS: dict[str, Callable[[int, Path], dict[str, float]]] = {
    KEEPS: partial(with_trainer, reduces=False),
    REDUCES: partial(with_trainer, reduces=True),
    OURS: with_harness,
}


def peak() -> int:
    """The largest resident memory of this process so far, in bytes; not that of the one that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found.group(1)) * 1024 if found else 0


def child(way: str, sequences: int) -> dict[str, Any]:
    """In this process: one batch, then all sequences."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        WAYS[way](BATCH, Path(scratch) / "one")
        base = peak()
        found = WAYS[way](sequences, Path(scratch) / "all")
    return {"accuracy": found["eval_accuracy"], "seconds": found["eval_runtime"], "grown": peak() - base}


def measure(device: str, repeats: int) -> list[Result | Curve]:
    found: dict[str, dict[int, list[dict[str, Any]]]] = {way: {count: [] for count in COUNTS} for way in WAYS}

    def measured(way: str, count: int) -> float:
        last = in_process("tests.benchmarks.evaluation", way, str(count))
        found[way][count].append(last)
        return float(last["seconds"])

    largest = COUNTS[-1]
    seconds = alternate({way: partial(measured, way, largest) for way in WAYS}, repeats=repeats)
    for count in COUNTS[:-1]:
        for way in WAYS:
            measured(way, count)
    accuracies = {each["accuracy"] for of_way in found.values() for each in of_way[largest]}
    if max(accuracies) - min(accuracies) > 1e-6:
        raise RuntimeError(f"the ways do not agree: {sorted(accuracies)}")
    grown = {
        way: {count: [each["grown"] / 2**20 for each in each_count] for count, each_count in of_way.items()}
        for way, of_way in found.items()
    }
    a_batch = BATCH * LENGTH * WORDS * 4 / 2**20
    beyond = {way: [each["grown"] / 2**20 / a_batch for each in of_way[largest]] for way, of_way in found.items()}
    setting = f"vocabulary {WORDS:,}, {LENGTH} tokens a sequence, batches of {BATCH}"
    return [
        Result(
            what=f"an evaluation of {largest} sequences",
            unit="s",
            figures=seconds,
            base=KEEPS,
            bounds=[Bound(relation="<=", limit=1.0, over=KEEPS), Bound(relation="<=", limit=1.0, over=REDUCES)],
            setting=setting,
        ),
        Result(
            what=f"memory beyond that of one batch, in an evaluation of {largest} sequences",
            unit="times the logits of a batch",
            figures=beyond,
            base=KEEPS,
            bounds=[Bound(relation="<=", limit=1.0)],
            setting=setting,
        ),
        Curve(what="memory beyond that of one batch", unit="MiB", size="sequences", figures=grown, setting=setting),
    ]


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], int(sys.argv[2]))))
