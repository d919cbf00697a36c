"""
How long a resume takes, from the start of the process to its first optimizer step: the Trainer and harness.

`python -m tests.benchmarks.resume_time [rounds]` resumes at 10 % and at 90 % of an epoch of a million samples in
batches of 8, in turns, each in a process of its own; it prints medians, and the least and the most. The model is one
small layer. The data is a set with an index, and a stream of `datasets` in 100 shards; a stream whose state is hidden
from harness shows what it costs to read it again.

Nobody trains 112,500 steps for that: two steps are trained and saved, then the checkpoint is moved. The step is
changed in trainer_state.json, and in ours the batches in harness_state.json, the state of the stream (which comes from
reading so many batches of it) and the digests. Optimizer and schedule stay those of step 2: they take as long to load.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments, set_seed

from harness.data.flags import DataConfig
from harness.data.samples import usable_samples
from harness.data.streams import StreamBatches
from harness.files import digest_of
from harness.tasks import Task, TaskConfig
from harness.train import main as train

SAMPLES, BATCH_SIZE, SHARDS, SAVED_STEP = 1_000_000, 8, 100, 2
STEPS = SAMPLES // BATCH_SIZE
SHARES = (0.1, 0.9)
KINDS = ("index", "stream", "hidden")
NAMES = {"index": "set with an index", "stream": "stream", "hidden": "stream, its state hidden"}


class Points(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((4,), index / SAMPLES)}


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(x).square().mean()}


class Hidden(IterableDataset):  # type: ignore[type-arg]
    """A stream without its state_dict."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Any:
        return iter(self.stream)


def data_of(kind: str) -> Any:
    if kind == "index":
        return Points()
    x = np.arange(SAMPLES, dtype=np.float32)
    stream = datasets.Dataset.from_dict({"x": x}).to_iterable_dataset(num_shards=SHARDS)
    return Hidden(stream) if kind == "hidden" else stream


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    if isinstance(samples[0]["x"], torch.Tensor):
        return {"x": torch.stack([sample["x"] for sample in samples])}
    return {"x": torch.tensor([[sample["x"]] * 4 for sample in samples])}


def build(config: TaskConfig) -> Task:
    return Task(model=Layer(), train_dataset=data_of((config.task_args or {})["kind"]), data_collator=collate)


def child(way: str, kind: str, folder: str, resume: str) -> None:
    """Two steps and a save; with a checkpoint: on to the first step, and out."""
    steps = STEPS if resume else SAVED_STEP
    if resume:
        register_optimizer_step_post_hook(lambda *_: (print(time.time(), flush=True), os._exit(0)))
    common = {"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": BATCH_SIZE}
    common |= {"save_strategy": "steps", "save_steps": steps, "report_to": "none"}
    common |= {"disable_tqdm": True, "logging_steps": STEPS, "use_cpu": True}
    if way == "harness":
        task = {"task": "tests.benchmarks.resume_time:build", "task_args": json.dumps({"kind": kind})}
        given = {**common, **task, **({"resume_from_checkpoint": resume} if resume else {})}
        sys.exit(train([f"--{name}={value}" for name, value in given.items()]))
    set_seed(42)
    arguments: Any = common
    trainer = Trainer(Layer(), TrainingArguments(**arguments), data_collator=collate, train_dataset=data_of(kind))
    trainer.train(resume_from_checkpoint=resume or None)


def run(way: str, kind: str, folder: Path, resume: Path | None = None) -> float:
    """Seconds from the start of a process to its first step, or to its end."""
    command = [sys.executable, "-m", "tests.benchmarks.resume_time", "child", way, kind, str(folder), str(resume or "")]
    began = time.time()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"{way} {kind}: {ended.stdout[-1000:]}{ended.stderr[-3000:]}")
    return float(ended.stdout.split()[-1]) - began if resume else time.time() - began


def states_of_stream() -> dict[int, Any]:
    """What a rank's checkpoint holds of the stream after so many batches."""
    wanted = {int(share * STEPS) for share in SHARES}
    samples = usable_samples(data_of("stream"), collate, Layer(), DataConfig(), group=None)
    batches = StreamBatches(
        samples.dataset,
        lambda fetch, *_: fetch() or None,
        batch_size=BATCH_SIZE,
        drop_last=False,
        ranks=(0, 1),
        num_workers=0,
    )
    batches.begin(0, None)
    states: dict[int, Any] = {}
    for _, mark in batches:
        batches.consumed(mark)
        if mark is not None and mark["batches"] in wanted:
            states[mark["batches"]] = batches.state_dict()
        if len(states) == len(wanted):
            break
    return states


def moved(checkpoint: Path, step: int, stream: Any) -> Path:
    """A copy of a checkpoint that says it was saved after another step of the same epoch."""
    copy = checkpoint.parent / f"checkpoint-{step}"
    shutil.copytree(checkpoint, copy)
    _change(copy / "trainer_state.json", {"global_step": step, "epoch": step / STEPS})
    manifest = copy / "harness_state.json"
    if not manifest.is_file():
        return copy
    generators = copy / "rng_state.pth"
    state = torch.load(generators, weights_only=False)  # our own, just written
    if stream is not None:
        state["harness"]["data"]["stream"] = stream
    torch.save(state, generators)
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["step"] = content["data"]["batches"] = step
    del content["sha256"]
    content["state"]["last_logged_step"] = step
    for name, facts in content["files"].items():
        facts.update(size=(copy / name).stat().st_size, sha256=digest_of(copy / name))
    manifest.write_text(json.dumps(content), encoding="utf-8")
    return copy


def _change(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def main(rounds: int) -> None:
    states = states_of_stream()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints: dict[tuple[str, str, int], Path] = {}
        for kind in KINDS:
            for way in ("Trainer", "harness"):
                if (way, kind) == ("Trainer", "hidden"):  # it reads every stream again
                    continue
                folder = Path(scratch) / way / kind
                run(way, kind, folder)
                for share in SHARES:
                    step = int(share * STEPS)
                    stream = states[step] if kind == "stream" else None
                    checkpoints[way, kind, step] = moved(folder / f"checkpoint-{SAVED_STEP}", step, stream)
        times: dict[tuple[str, str, int], list[float]] = {case: [] for case in checkpoints}
        for i in range(rounds):
            for case, checkpoint in checkpoints.items():
                seconds = run(*case[:2], Path(scratch) / f"resumed-{i}" / "-".join(map(str, case)), checkpoint)
                times[case].append(seconds)
        for (way, kind, step), found in times.items():
            where = f"{NAMES[kind]:26} {way:8} at {step / STEPS:.0%}"
            print(f"{where}: {statistics.median(found):6.2f} s ({min(found):.2f}-{max(found):.2f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
