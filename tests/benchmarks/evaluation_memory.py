"""
What an evaluation with metrics takes of memory, over a vocabulary of 50,000 words: the Trainer and harness. Linux.

`python -m tests.benchmarks.evaluation_memory [sequences ...]` evaluates so many sequences (250, 500, 1000) of eight
tokens with each, in a process of its own: the accuracy, the largest resident memory, what of it goes beyond that of
one batch, and the time. The Trainer keeps all logits for `compute_metrics`, 1.6 MB a sequence.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from harness.tasks import Task, TaskConfig
from harness.tasks.scores.classification import TokenAccuracy
from harness.train import main as harness

WORDS, LENGTH, BATCH = 50_000, 8, 25


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


def with_harness(sequences: int, folder: Path) -> float:
    out = folder / f"harness-{sequences}"
    argv = ["--task=tests.benchmarks.evaluation_memory:build", f'--task_args={{"sequences": {sequences}}}']
    argv += [f"--output_dir={out}", f"--per_device_eval_batch_size={BATCH}", "--report_to=none", "--use_cpu"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = harness([*argv, "--do_eval"])
    if code != 0:
        raise SystemExit(code)
    return float(json.loads((out / "all_results.json").read_text(encoding="utf-8"))["eval_accuracy"])


def with_trainer(sequences: int, folder: Path) -> float:
    set_seed(42)
    task = build(TaskConfig(task="tests.benchmarks.evaluation_memory:build", task_args={"sequences": sequences}))

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        words = prediction.predictions.argmax(-1)[:, :-1]
        return {"accuracy": float((words == prediction.label_ids[:, 1:]).mean())}

    arguments = TrainingArguments(
        output_dir=str(folder / f"trainer-{sequences}"),
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
    )
    return float(trainer.evaluate()["eval_accuracy"])


WAYS: dict[str, Callable[[int, Path], float]] = {"Trainer": with_trainer, "harness": with_harness}


def peak() -> int:
    """The largest resident memory of this process so far, in bytes; not that of the one that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found.group(1)) * 1024 if found else 0


def measure(way: str, sequences: int) -> dict[str, Any]:
    """In this process: one batch, then all sequences."""
    with tempfile.TemporaryDirectory() as scratch:
        WAYS[way](BATCH, Path(scratch))
        base, began = peak(), time.perf_counter()
        accuracy = WAYS[way](sequences, Path(scratch))
        seconds = time.perf_counter() - began
    return {"accuracy": accuracy, "peak": peak(), "grown": peak() - base, "seconds": seconds}


def measured(way: str, sequences: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.evaluation_memory", "--measure", way, str(sequences)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main(counts: list[int]) -> None:
    print(f"{'sequences':>9}  {'':8}  {'accuracy':>8}  {'peak':>9}  {'beyond one batch':>16}  {'time':>6}")
    for sequences in counts:
        for way in WAYS:
            found = measured(way, sequences)
            sizes = f"{found['peak'] / 2**20:5.0f} MiB  {found['grown'] / 2**20:12.0f} MiB"
            print(f"{sequences:9}  {way:8}  {found['accuracy']:8.6f}  {sizes}  {found['seconds']:4.1f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main([int(count) for count in sys.argv[1:]] or [250, 500, 1000])
