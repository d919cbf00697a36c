"""
The position in a million samples: a resume at 90 % beside one at their beginning, and a start by the number of samples.

A resume is measured from the start of the process to its first optimizer step, each in a process of its own. The model
is one small layer. The data is a set with an index, and a stream of `datasets` in 100 shards. Nobody trains 112,500
steps for that: two steps are trained and saved, then the checkpoint is moved. The step is changed in
trainer_state.json, and in ours the batches in harness_state.json, the state of the stream (which comes from reading so
many batches of it) and the digests. Optimizer and schedule stay those of step 2: they take as long to load.

A start is measured from the loader's making to its first batch, with what the process grows by, of up to 100 million
samples; beside it torch's loader and RandomSampler, which the Trainer takes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset, RandomSampler
from transformers import Trainer, TrainingArguments, set_seed

from harness.data.flags import DataConfig
from harness.data.loader import TrainLoader
from harness.data.samples import usable_samples
from harness.data.streams import StreamBatches
from harness.files import digest_of
from harness.tasks import Task, TaskConfig
from harness.train import main as train
from tests.benchmarks.contest import OURS, Bound, Curve, Result, alternate, in_process
from tests.benchmarks.evaluation import peak

SAMPLES, BATCH_SIZE, SHARDS, SAVED_STEP = 1_000_000, 8, 100, 2
STEPS = SAMPLES // BATCH_SIZE
SHARE, SIZES = 0.9, (1_000_000, 10_000_000, 100_000_000)
KINDS = {"index": "set with an index", "stream": "stream"}
BEGINNING, TORCH = "ours at 0 %", "torch's RandomSampler"


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


def data_of(kind: str) -> Any:
    if kind == "index":
        return Points()
    x = np.arange(SAMPLES, dtype=np.float32)
    return datasets.Dataset.from_dict({"x": x}).to_iterable_dataset(num_shards=SHARDS)


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
        task = {"task": "tests.benchmarks.position:build", "task_args": json.dumps({"kind": kind})}
        given = {**common, **task, **({"resume_from_checkpoint": resume} if resume else {})}
        sys.exit(train([f"--{name}={value}" for name, value in given.items()]))
    set_seed(42)
    arguments: Any = common
    trainer = Trainer(Layer(), TrainingArguments(**arguments), data_collator=collate, train_dataset=data_of(kind))
    trainer.train(resume_from_checkpoint=resume or None)


def run(way: str, kind: str, folder: Path, resume: Path | None = None) -> float:
    """Seconds from the start of a process to its first step, or to its end."""
    command = [sys.executable, "-m", "tests.benchmarks.position", "child", way, kind, str(folder), str(resume or "")]
    began = time.time()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"{way} {kind}: {ended.stdout[-1000:]}{ended.stderr[-3000:]}")
    return float(ended.stdout.split()[-1]) - began if resume else time.time() - began


def resumed(way: str, kind: str, checkpoint: Path) -> float:
    """Seconds from the start of a process, which resumes, to its first step."""
    with tempfile.TemporaryDirectory() as scratch:
        return run(way, kind, Path(scratch) / "run", checkpoint)


def state_of_stream(num_batches: int) -> Any:
    """What a rank's checkpoint holds of the stream after so many batches."""
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
    for _, mark in batches:
        batches.consumed(mark)
        if mark is not None and mark["batches"] == num_batches:
            break
    return batches.state_dict()


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


def measure(device: str, repeats: int) -> list[Result | Curve]:
    state = state_of_stream(int(SHARE * STEPS))
    results: list[Result | Curve] = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind, name in KINDS.items():
            ways: dict[str, Callable[[], float]] = {}
            for way in ("harness", "Trainer") if kind == "index" else ("harness",):
                folder = Path(scratch) / way / kind
                run(way, kind, folder)
                first = folder / f"checkpoint-{SAVED_STEP}"
                late = moved(first, int(SHARE * STEPS), state if kind == "stream" else None)
                if way == "harness":
                    ways[BEGINNING] = partial(resumed, way, kind, first)
                    ways[OURS] = partial(resumed, way, kind, late)
                else:
                    ways["Trainer at 90 %"] = partial(resumed, way, kind, late)
            results.append(
                Result(
                    what=f"resume at 90 % of {SAMPLES:,} samples of a {name}",
                    unit="s to the first step",
                    figures=alternate(ways, repeats=repeats),
                    base=BEGINNING,
                    bounds=[Bound(relation="<=", limit=1.1, over=BEGINNING)],
                    setting=f"batches of {BATCH_SIZE}; a small layer",
                )
            )
    return [*results, *starts(repeats)]


def starts(repeats: int) -> list[Curve]:
    """Curves of the time and the memory of a start."""
    seconds: dict[str, dict[float, list[float]]] = {}
    grown: dict[str, dict[float, list[float]]] = {}
    for way, sizes in {OURS: SIZES, TORCH: SIZES[:-1]}.items():  # whose list would take 4 GB
        found = {size: in_process("tests.benchmarks.position", "start", way, str(size), str(repeats)) for size in sizes}
        seconds[way] = {size: each["seconds"] for size, each in found.items()}
        grown[way] = {size: [each["grown"] / 2**20] for size, each in found.items()}
    common: Any = {"size": "samples", "setting": f"a set with an index, in random order, batches of {BATCH_SIZE}"}
    return [
        # A permutation reads memory at random: beyond the caches, from 10 million on, each place takes longer.
        Curve(what="start to the first batch", unit="s", figures=seconds, most_growth=1.3, **common),
        Curve(what="memory of a start to the first batch", unit="MiB", figures=grown, most_growth=1.0, **common),
    ]


class Many(Dataset):  # type: ignore[type-arg]
    """So many samples by index."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((4,), index / self.size)}


def start(way: str, size: int, repeats: int) -> dict[str, Any]:
    """In this process: the seconds of each start, and the bytes that the first adds to the largest memory."""
    accelerator = Accelerator(cpu=True)

    def first(data: Many) -> Any:
        if way == TORCH:
            return next(iter(DataLoader(data, batch_size=BATCH_SIZE, sampler=RandomSampler(data), collate_fn=collate)))
        config = DataConfig(per_device_train_batch_size=BATCH_SIZE)
        samples = usable_samples(data, collate, Layer(), config, group=None)
        loader = TrainLoader(samples, config, accelerator, seed=42)
        loader.state_dict()
        return next(loader.epoch(0))

    first(Many(1000))
    base, seconds, grown = peak(), [], 0
    for _ in range(repeats):
        began = time.perf_counter()
        first(Many(size))
        seconds.append(time.perf_counter() - began)
        grown = grown or peak() - base
    return {"seconds": seconds, "grown": grown}


if __name__ == "__main__":
    if sys.argv[1] == "start":
        print(json.dumps(start(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        child(*sys.argv[2:])
