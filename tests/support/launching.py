"""Commands in processes of their own, and what starts several: accelerate's launcher and torchrun."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil
import pytest

from harness.config import release
from harness.distributed.accelerator import LOWEST_TORCH_OF_FSDP
from tests.support.forking import fork, start
from tests.support.parity import as_flags

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "harness" / "train.py")
# What tests launch: ddp.yaml most of them, those of each list its own tests.
DDP, FP16, FSDP2, FSDP2_OFFLOAD = (
    ROOT / "launch_configs" / f"{name}.yaml" for name in ("ddp", "ddp_fp16", "fsdp2", "fsdp2_offload")
)
PLAIN = [ROOT / "launch_configs" / f"{name}.yaml" for name in ("cpu_2", "ddp_bf16", "single")]
ZERO = sorted((ROOT / "launch_configs").glob("zero*.yaml"))
MULTI_NODE = sorted((ROOT / "launch_configs").glob("multi_node_*.yaml"))
needs_fsdp = pytest.mark.skipif(release("torch") < LOWEST_TORCH_OF_FSDP, reason="FSDP2 needs a newer torch")
SECONDS = 150
# transformers prints a line to stdout when it is imported with WANDB_MODE=offline.
NOT_INHERITED = (
    "WANDB_MODE",
    "ACCELERATE_",
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "FSDP_",
    "TORCHELASTIC_",
    "GROUP_",
)


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def run(
    command: Sequence[str], *, cwd: Path = ROOT, forked: bool = True, seconds: float = SECONDS, **variables: str
) -> Ended:
    """Run it to the end, within `seconds`, without what a launch or W&B left in the environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    env = {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return finish(command, cwd, env, forked=forked, seconds=seconds)


def finish(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], *, forked: bool = True, seconds: float = SECONDS
) -> Ended:
    """
    Run it to the end; a launch that hangs is ended with all its processes.

    `forked` is Python with the libraries loaded; without it a start is like a user's, and may be any command.
    """
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        if forked:
            process = fork(command[1:], env=env, cwd=cwd, out=out, err=err)
        else:
            process = start(command, env=env, cwd=cwd, out=out, err=err)
        try:
            code = process.wait(seconds)
        finally:
            if process.poll() is None:
                # Ranks have groups of their own.
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                process.wait()
        out.seek(0)
        err.seek(0)
        return Ended(code, out.read(), err.read())


def free_port() -> int:
    """Not one that the system gives to connections: it may do so again before the launcher listens."""
    while True:
        port = random.SystemRandom().randrange(10000, 32000)
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def launcher(config: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        f"--config_file={config}",
        f"--main_process_port={free_port()}",
        *options,
    ]


def torchrun(processes: int) -> list[str]:
    options = [f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    return [sys.executable, "-m", "torch.distributed.run", *options]


def flags(folder: Path, arguments: dict[str, Any]) -> list[str]:
    return [
        *as_flags(
            {"task": "tests.support.tasks.parity_task:build", "report_to": "none", "output_dir": folder, **arguments}
        )
    ]
