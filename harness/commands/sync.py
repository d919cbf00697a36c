"""
`harness sync DIR... [--until-finished | --once] [--interval SECONDS]`: upload runs to W&B, each row exactly once.

It uploads offline runs, also while they are written, and what online runs could not deliver. It may be killed and
started again at any time. Exit codes: 0 all is in W&B, 1 something is left, 2 bad input or no W&B. Here are the
arguments alone: `commands/watch.py` looks for the runs, `tracking/sync.py` uploads one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from harness.commands import Parser
from harness.errors import ConfigError


def parser() -> Parser:
    """Return the command's parser."""
    own = Parser(
        "sync",
        description="Bring runs to W&B, each row once: offline ones, also while they are written, and what online ones "
        "could not deliver. It ends when no run is running any more; start it again as you like.",
    )
    own.add_argument(
        "dir", metavar="DIR", nargs="+", type=Path, help="output_dir of a training, a folder of such, or one of W&B's."
    )
    ends = own.add_mutually_exclusive_group()
    ends.add_argument(
        "--until-finished",
        action="store_true",
        help="Wait for runs to begin, and for preempted or killed ones to go on; end when all are finished and in W&B.",
    )
    ends.add_argument("--once", action="store_true", help="Bring what is there now, and end.")
    own.add_argument("--interval", type=float, default=30.0, help="Seconds between two looks. Default: 30.")
    return own


def run(argv: Sequence[str]) -> int:
    """Upload the runs; returns the exit code. Raises ConfigError and UnreachableError."""
    given = parser().parse_args(argv)
    if given.interval <= 0:
        raise ConfigError(f"--interval={given.interval:g}: give seconds, more than 0.")
    folders = [folder.expanduser() for folder in given.dir]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder.")
    from harness.commands.watch import Watch

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    watch = Watch(folders)
    watch.check(needs_runs=not given.until_finished)
    return watch.follow(interval=given.interval, once=given.once, until_finished=given.until_finished)
