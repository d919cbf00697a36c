"""
`python -m harness.export CHECKPOINT OUT`: a checkpoint as a folder that `from_pretrained` loads.

Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from harness.errors import ConfigError
from harness.export.folder import export

SIZE = re.compile(r"[1-9]\d*([KMGT]B)?")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    try:
        given = _parser().parse_args(argv)
        if not SIZE.fullmatch(given.max_shard_size):
            raise ConfigError(f"--max_shard_size={given.max_shard_size}: give bytes, or a size as 500MB or 5GB.")
        dtype = getattr(torch, given.dtype) if given.dtype else None
        done = export(given.checkpoint, given.out, max_shard_size=given.max_shard_size, dtype=dtype)
    except ConfigError as error:
        return _fail(2, str(error))
    except KeyboardInterrupt:
        return _fail(130, "Interrupted; nothing was written.")
    files = "one file" if done.num_files == 1 else f"{done.num_files} files"
    print(f"{given.out}: {done.num_bytes:,} bytes of weights in {files}, {done.dtype}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.export",
        description="Write the model of a checkpoint, ours or a Trainer's, as a folder that from_pretrained loads.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="Folder checkpoint-N of a training.")
    parser.add_argument("out", metavar="OUT", type=Path, help="Folder to write; it may not exist yet, or is empty.")
    parser.add_argument("--max_shard_size", default="5GB", help="Most bytes of a file: 500MB, 5GB. Default: 5GB.")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="Type of the weights; default: as they are."
    )
    return parser


def _fail(code: int, message: str) -> int:
    print(f"harness.export: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
