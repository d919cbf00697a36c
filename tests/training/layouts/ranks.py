"""
Trainings one after the other in the same processes, since a launch takes longer than a training of a tiny model.

`... -m tests.training.layouts.ranks FILE`, under a launcher or not: FILE holds a list of command lines in JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from harness.train import main
from tests.support.parity import reset


def train_all(commands: list[list[str]]) -> None:
    close = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *_: None  # the next training goes on with the group
    for command in commands:
        reset()
        if main(command) != 0:
            sys.exit(f"failed: {' '.join(command)}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(0.1)  # harness.distributed.ranks.settle says why
        close()


if __name__ == "__main__":
    train_all(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
