"""Runs a benchmark in a process of its own, so that none of them sees what another one has imported or left."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.contest import ROOT
from tests.benchmarks.runner.find import GPU, Benchmark
from tests.benchmarks.runner.results import commit, machine, now, versions

LAST_LINES = 6


def measure(benchmark: Benchmark, device: str, repeats: int) -> dict[str, Any]:
    """What a benchmark has found, with machine, date, commit and versions; `error` says why it has found nothing."""
    began = time.monotonic()
    outcome = {"about": benchmark.about, "date": now(), "machine": machine(device), "commit": commit()}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "results.json"
        given = [f"--device={device}", f"--json={file}"]
        if benchmark.name == GPU:
            command = ["tests.benchmarks.gpu", *given]
        else:
            command = ["tests.benchmarks.contest", benchmark.module, *given, f"--repeats={repeats}"]
        ended = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        text = file.read_text(encoding="utf-8") if file.exists() else "[]"
    results, error = json.loads(text), ""
    if ended.returncode != 0 and not (benchmark.name == GPU and results):  # it judges by itself, and says so by a 1
        said = [line for line in ended.stderr.splitlines() if line.strip()][-LAST_LINES:]
        error = "\n".join([f"it ended with {ended.returncode}", *said])
    seconds = round(time.monotonic() - began, 1)
    return {
        **outcome,
        "versions": versions(),
        "repeats": repeats,
        "seconds": seconds,
        "error": error,
        "results": results,
    }
