"""`harness export CHECKPOINT OUT`: write a checkpoint's model as a folder that `from_pretrained` loads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from harness.commands import Parser
from harness.errors import ConfigError

SIZE = re.compile(r"[1-9]\d*([KMGT]B)?")


def parser() -> Parser:
    """Return the command's parser."""
    own = Parser(
        "export",
        description="Write the model of a checkpoint, ours or a Trainer's, as a folder that from_pretrained loads.",
    )
    own.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="Folder checkpoint-N of a training.")
    own.add_argument("out", metavar="OUT", type=Path, help="Folder to write; it may not exist yet, or is empty.")
    own.add_argument("--max_shard_size", default="5GB", help="Most bytes of a file: 500MB, 5GB. Default: 5GB.")
    own.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="Type of the weights; default: as they are."
    )
    return own


def run(argv: Sequence[str]) -> int:
    """Write the folder; returns the exit code. Raises ConfigError."""
    given = parser().parse_args(argv)
    if not SIZE.fullmatch(given.max_shard_size):
        raise ConfigError(f"--max_shard_size={given.max_shard_size}: give bytes, or a size as 500MB or 5GB.")
    import torch

    from harness.export.folder import export

    dtype = getattr(torch, given.dtype) if given.dtype else None
    done = export(given.checkpoint, given.out, max_shard_size=given.max_shard_size, dtype=dtype)
    files = "one file" if done.num_files == 1 else f"{done.num_files} files"
    print(f"{given.out}: {done.num_bytes:,} bytes of weights in {files}, {done.dtype}", flush=True)
    return 0
