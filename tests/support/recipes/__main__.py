"""Train each recipe of the Hub on its stand-in and print the figures of harness/recipes/README.md."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from tests.support.recipes.figures import figures
from tests.support.recipes.stand_ins import STAND_INS


def main() -> None:
    """Print a row of the page's table for each recipe."""
    for name in STAND_INS:
        with TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            row = figures(name, Path(folder))
        print(f"| `{name}` | {row} |")


if __name__ == "__main__":
    main()
