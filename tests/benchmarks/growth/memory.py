"""
What a training takes of memory for each parameter of its model, for models of two sizes. Linux.

That is the largest resident memory beyond what the process had before it made the model: weights, gradients and AdamW's
two averages are 16 bytes; a checkpoint's copies in host memory, which let a training go on while it is written, are 12.
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

from transformers import Trainer, TrainingArguments

from harness.train import main
from tests.benchmarks.contest import OURS, Curve, alternate, in_process
from tests.benchmarks.peers.ways import torch_alone
from tests.benchmarks.peers.work import TASK, Work, offered

LAYERS = (3, 12)
WIDTH, LENGTH, STEPS = 512, 16, 4
CONSTANT = 0.1
OURS_SAVING = f"{OURS}, saving"


def measure(device: str, repeats: int) -> list[Curve]:
    figures: dict[str, dict[float, list[float]]] = {name: {} for name in WAYS}
    for layers in LAYERS:
        ways = {name: partial(bytes_a_parameter, name, layers) for name in WAYS}
        for name, found in alternate(ways, repeats=repeats, again=False).items():
            figures[name][parameters_of(layers)] = found
    setting = f"GPT-2 of {WIDTH} wide, one sample of {LENGTH} tokens, one thread"
    what = "memory for a parameter"
    return [Curve(what=what, unit="bytes", size="parameters", figures=figures, most_growth=CONSTANT, setting=setting)]


def parameters_of(layers: int) -> int:
    return layers * (12 * WIDTH**2 + 13 * WIDTH) + (256 + LENGTH + 2) * WIDTH


def bytes_a_parameter(way: str, layers: int) -> float:
    found = in_process("tests.benchmarks.growth.memory", way, str(layers), OMP_NUM_THREADS="1")
    return float(found["bytes"]) / float(found["parameters"])


def memory(kind: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` the most since `forget_the_most`."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0


def forget_the_most() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def bare(folder: str, layers: int) -> None:
    torch_alone(work_of(layers), folder)


def trainer(folder: str, layers: int) -> None:
    work = work_of(layers)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=work.batch,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(work.model(), arguments, data_collator=work.collator, train_dataset=work.samples).train()


def ours(folder: str, layers: int, *, saves: bool = False) -> None:
    work = work_of(layers)
    flags = [f"--per_device_train_batch_size={work.batch}", f"--max_steps={STEPS}", "--report_to=none", "--use_cpu"]
    saving = [f"--save_steps={STEPS // 2}"] if saves else ["--save_strategy=no"]
    with offered(work):
        code = main([f"--task={TASK}", f"--output_dir={folder}/run", "--disable_tqdm=true", *flags, *saving])
    if code != 0:
        raise RuntimeError(f"harness ended with {code}")


def work_of(layers: int) -> Work:
    shape = {"n_layer": layers, "n_head": 8, "n_embd": WIDTH, "vocab_size": 256, "n_positions": LENGTH}
    return Work(shape, steps=STEPS, batch=1)


WAYS: dict[str, Callable[[str, int], None]] = {
    "bare torch": bare,
    "Trainer, saving": trainer,
    OURS: ours,
    OURS_SAVING: partial(ours, saves=True),
}


def child(way: str, layers: int) -> dict[str, int]:
    """In this process: a small model first, so that what is imported and compiled is there, then this one."""
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        WAYS[way](f"{folder}/first", 1)
        forget_the_most()
        before = memory("VmRSS")
        WAYS[way](f"{folder}/second", layers)
    return {"bytes": memory("VmHWM") - before, "parameters": parameters_of(layers)}


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], int(sys.argv[2]))))
