"""
Prepare data slowly: `python -m tests.support.preparing FILE CACHE CALLS`.

Loads FILE and applies a slow function to each thousand of its rows; CALLS gets a line for each call: the process.
Prints the sum and the number of the rows, as they are read back from the cache.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.tasks import TaskConfig
from harness.tasks.rows import load_splits

SECONDS = 0.5


def main(file: str, cache: str, calls: str) -> None:
    def slowly(batch: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        with Path(calls).open("a", encoding="utf-8") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(SECONDS)
        return {"number": [number + 1 for number in batch["number"]]}

    config = TaskConfig(train_file=file, cache_dir=cache)
    rows = load_splits(config)["train"].transform(slowly, config, keep_columns=True).rows
    print(sum(rows["number"]), len(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
