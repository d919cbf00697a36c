"""
GPT-2, a Llama, a small step, a save and an observation: harness beside a bare loop, the Trainer and others on a card.

`python -m tests.benchmarks gpu [NAME...] [--device cpu|cuda] [--seconds S] [--json FILE]` runs all or those named:
gpt2, llama, save, step, watch. S is about how long each measures, beside starts and compilation. FILE gets a list with
a result for each, whole after each of them. On the CPU sizes are tiny and no bound is judged. The exit code is 1 if a
bound is missed or a benchmark raised.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

# Read when the libraries are imported. The Trainer would divide each batch among all cards that it sees.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
)

import torch
from transformers.utils.import_utils import enable_tf32

from tests.benchmarks.gpu.outcomes import Benchmark, Device, measure_all
from tests.benchmarks.gpu.saving import save
from tests.benchmarks.gpu.training import gpt2, llama, step
from tests.benchmarks.gpu.watching import watch

BENCHMARKS: dict[str, Benchmark] = {"gpt2": gpt2, "save": save, "llama": llama, "step": step, "watch": watch}
SECONDS = {"cuda": 15.0, "cpu": 2.0}


def command() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks gpu")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--device", choices=SECONDS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="about how long each measures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results are written")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.names) - BENCHMARKS.keys()):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    for number in (signal.SIGINT, signal.SIGTERM):  # what has been found until then is written
        signal.signal(number, signal.default_int_handler)
    if asked.device == "cuda":
        enable_tf32(True)  # as the Trainer does when it compiles; so it is the same for all
    else:
        torch.set_num_threads(1)  # threads of small products wait for each other, the more on a busy machine
    device = Device(asked.device, asked.seconds or SECONDS[asked.device])
    return measure_all({name: BENCHMARKS[name] for name in asked.names or BENCHMARKS}, device, asked.json)


if __name__ == "__main__":
    sys.exit(command())
