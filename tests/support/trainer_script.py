"""The reference under a launcher: `accelerate launch -m tests.support.trainer_script JSON`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from harness.distributed.ranks import settle
from tests.support.parity import run_trainer


def main() -> None:
    torch.set_num_threads(1)
    call = json.loads(sys.argv[1])
    trainer = run_trainer(Path(call["folder"]), call["arguments"], task_config=call.get("task_config"))
    if trainer.is_world_process_zero():
        print(f"processes: {trainer.args.world_size}")
    torch.distributed.barrier()
    settle()  # without it a rank hangs now and then in torch's destructor
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
