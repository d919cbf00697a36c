"""The parts of `tests/gpu/run.sh`: each has its own seconds, and its results are written when it ends, however."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.gpu.outcomes import NOT_TRIED
from tests.support.forking import fork, forks_reach

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
RESULTS, TABLE = HERE / "results.json", HERE / "results.md"
SECONDS = 420
TO_END = 10  # for a part that is told to stop
ENDED_BY_SIGINT = 130  # the exit code of a benchmark then
PACKAGES = ("torch", "transformers", "accelerate", "wandb", "deepspeed", "datasets", "peft", "liger-kernel")
CODE = ("harness", "launch_configs", "tests")
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Tests of this folder, or a benchmark, and the seconds they may take when there are 420 for all."""

    name: str
    seconds: int
    tests: Sequence[str] = ()
    benchmark: str = ""


PARTS = (
    Part("the main job in bf16 and compiled", 70, ["test_main_job.py", "-k", "bf16 or compile"]),
    Part("GPT-2 against a bare loop and the Trainer", 120, benchmark="gpt2"),
    Part("killed and resumed", 90, ["test_resume.py", "test_host_copies.py"]),
    Part("how long a save holds up", 40, benchmark="save"),
    Part("watch, and waits for the device", 30, ["test_watch.py", "test_syncs.py"]),
    Part("the Trainer's numbers", 60, ["test_trainer.py"]),
    Part("sharded", 90, ["test_sharded.py"]),
    Part("the main job in other precisions", 60, ["test_main_job.py", "-k", "not bf16 and not compile"]),
    Part("out of memory", 30, ["test_out_of_memory.py"]),
    Part("devices", 60, ["test_devices.py"]),
    Part("throughput columns", 30, ["test_throughput.py"]),
    Part("memory and kernels", 60, ["test_memory.py"]),
    Part("Llama 1 B", 90, benchmark="llama"),
    Part("a small step", 40, benchmark="step"),
    Part("watch, timed", 40, benchmark="watch"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh")
    parser.add_argument("seconds", nargs="?", type=float, default=SECONDS)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    asked = parser.parse_args(argv)
    ends_at = time.monotonic() + asked.seconds
    device, card = look_for_card(asked.device)
    runner = Runner(device)
    results = read_results(device, card)
    for part in sorted(PARTS, key=lambda part: part.name in results["parts"]):  # first those that were never begun
        if not lacks(results, part):
            print(f"\n== {part.name}: stands in {RESULTS.name}", flush=True)
            continue
        limit = min(part.seconds * max(1.0, asked.seconds / SECONDS), ends_at - time.monotonic() - TO_END)
        if limit <= 0:
            print(f"\n== {part.name}: no time left", flush=True)
            continue
        print(f"\n== {part.name}: at most {limit:.0f} s", flush=True)
        results["parts"][part.name] = runner.run(part, limit)
        write_results(results)
        print(table(results, only=part.name), flush=True)
    print(f"\n{table(results)}", flush=True)
    failed = any(row["outcome"] == "failed" for rows in results["parts"].values() for row in rows)
    return int(failed or any(lacks(results, part) for part in PARTS))


def lacks(results: Row, part: Part) -> bool:
    """Whether a part, or what of it was cut off, is still to be run."""
    return any(row["outcome"] == "not reached" for row in results["parts"].get(part.name, [{"outcome": "not reached"}]))


def look_for_card(asked: str | None) -> tuple[str, str]:
    """The device to use and its name, asked of another process: this one must not touch the card before it forks."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = ""
    if asked != "cpu":
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    device = asked or ("cuda" if found else "cpu")
    return device, found if device == "cuda" else f"CPU, {os.cpu_count()} cores"


def read_results(device: str, card: str) -> Row:
    """The results of before, if they are of this code, device and these versions; else none."""
    fresh: Row = {"code": digest(), "commit": commit(), "device": card, "versions": versions()}
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if {name: known.get(name) for name in fresh} == fresh:
        return known
    return {**fresh, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "parts": {}}


def digest() -> str:
    """Of what is tested: a copy of a checkout may have no history."""
    files = sorted(path for name in CODE for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".yaml"))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known here"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


class Runner:
    """Runs parts in processes of their own: forked ones, with the libraries loaded, if such a one reaches the card."""

    def __init__(self, device: str) -> None:
        self.device = device
        # Options for the pytest of whoever calls this, as `-n 2`, are none for the parts.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self.env = {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
        forks_reach(device)

    def run(self, part: Part, limit: float) -> list[Row]:
        """The rows of a part; for what was not reached before the limit, rows that say so."""
        with tempfile.TemporaryDirectory(prefix="harness-gpu-") as folder:
            found = Path(folder) / "found"
            began = time.time()
            code = self.ended_within(limit, self.argv(part, found))
            seconds = time.time() - began
            text = found.read_text(encoding="utf-8") if found.exists() else ""
        why = f"the part ended after {seconds:.1f} s of {limit:.0f}, with exit code {code}"
        if part.benchmark:
            rows = json.loads(text or "[]")
            left = [] if rows else [part.benchmark]
            if code == ENDED_BY_SIGINT:  # it has some figures
                rows = [{**row, "outcome": "not reached"} for row in rows]
        else:
            read = [json.loads(line) for line in text.splitlines()]
            rows = [_within(began + limit, row, why) for row in read if "name" in row]
            chosen = [name for row in read for name in row.get("chosen", [])]
            left = [name for name in chosen if name not in {row["name"] for row in rows}] if chosen else [part.name]
        return rows + [
            {"name": name, "outcome": "not reached", "seconds": 0, "figures": {}, "why": why} for name in left
        ]

    def argv(self, part: Part, found: Path) -> list[str]:
        if part.benchmark:
            return ["-m", "tests.benchmarks", "gpu", part.benchmark, f"--device={self.device}", f"--json={found}"]
        tests = [str(HERE / word) if word.endswith(".py") else word for word in part.tests]
        plugin = ["-p", "no:cacheprovider", "-p", "tests.gpu.outcomes", f"--outcomes={found}"]
        options = ["-q", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={HERE}", "-m", "gpu"]
        # Of the libraries that a forked process has loaded some bring plugins of their own.
        options += [
            "--continue-on-collection-errors",
            "-W",
            "ignore:Module already imported:pytest.PytestAssertRewriteWarning",
        ]
        return ["-m", "pytest", *options, *plugin, f"--device={self.device}", *tests]

    def ended_within(self, limit: float, argv: Sequence[str]) -> int:
        """Run `python ARGV...`, at the limit tell it to stop, later kill it; returns its exit code."""
        process = fork(argv, env=self.env, cwd=ROOT, out=sys.stdout, err=sys.stderr)
        for told, seconds in ((signal.SIGINT, limit), (signal.SIGKILL, TO_END)):
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):  # it has ended just now
                    os.killpg(process.pid, told)
        return process.wait()


def _within(until: float, row: Row, why: str) -> Row:
    """A row of a test; what failed after it was told to stop, as a training that answers a Ctrl-C, was not reached."""
    ended_at = row.pop("ended_at")
    return {**row, "outcome": "not reached", "why": why} if row["outcome"] == "failed" and ended_at > until else row


def write_results(results: Row) -> None:
    for path, text in ((RESULTS, json.dumps(results, indent=1) + "\n"), (TABLE, table(results))):
        fresh = path.with_name(f"{path.name}.partial")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)


def table(results: Row, *, only: str | None = None) -> str:
    """The rows in Markdown, for RESULTS.md; of all parts in their order, or of one."""
    parts = {part.name: results["parts"].get(part.name, []) for part in PARTS if only in (None, part.name)}
    used = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"{results['date']}, {results['device']}, commit {results['commit']}, code {results['code']}; {used}.",
        "",
        "| part | test or benchmark | outcome | s | figures |",
        "|---|---|---|---|---|",
    ]
    for name, rows in parts.items():
        for row in rows:
            told = ", ".join(f"{key} {value}" for key, value in row["figures"].items())
            why = row["why"].splitlines()[0][:160] if row["why"] else ""
            cells = (name, row["name"], row["outcome"], row["seconds"], "; ".join(filter(None, (told, why))))
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    tried = [row["outcome"] for rows in parts.values() for row in rows]
    kinds = ("passed", "failed", "not judged", NOT_TRIED, "skipped", "not reached")
    counts = ", ".join(f"{tried.count(kind)} {kind}" for kind in kinds if kind in tried)
    return "\n".join([*lines, "", f"In all: {counts}.", ""])


if __name__ == "__main__":
    sys.exit(main())
