"""
Whether losses, gradients and evaluations depend on how the global batch is split: prints the table.

`python -m tests.training.layouts [CASE ...] [--backend NAME] [--FLAG=VALUE ...]`: CASE is the beginning of a case's
name; NAME is a file in launch_configs/ (fsdp2, zero2, zero3) for the layouts on two processes; flags are given to every
training. A cell has the largest relative differences from 8 samples at once on one process over 20 steps: of the loss,
of the norm of the gradients, and of what evaluations say.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.support.launching import ROOT
from tests.training.layouts.table import OTHERS, lines, train_alone, train_on_two
from tests.training.layouts.tasks import CASES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--backend", default="ddp")
    options, flags = parser.parse_known_args()
    cases = [name for name in CASES if not options.cases or name.startswith(tuple(options.cases))]
    more = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        train_alone(Path(temporary), cases, **more)
        train_on_two(Path(temporary), cases, ROOT / "launch_configs" / f"{options.backend}.yaml", **more)
        shown = lines(Path(temporary), cases, OTHERS)
    print("\n".join(shown))
    print(f"\n{len(cases)} cases in {time.monotonic() - began:.0f} s")
    return int(any("differs" in line for line in shown))


if __name__ == "__main__":
    sys.exit(main())
