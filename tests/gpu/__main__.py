"""The parts of `tests/gpu/run.sh`: each has its own seconds, and its results are written when it ends, however."""

from __future__ import annotations

import argparse
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
from tests.support.forking import fork, start

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
RESULTS, TABLE = HERE / "results.json", HERE / "results.md"
SECONDS = 420
TO_END = 10  # for a part that is told to stop
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
    for part in PARTS:
        if part.name in results["parts"]:
            print(f"\n== {part.name}: stands in {RESULTS.name}", flush=True)
            continue
        limit = min(part.seconds * max(1.0, asked.seconds / SECONDS), ends_at - time.monotonic() - TO_END)
        if limit <= 0:
            print(f"\n== {part.name}: no time left", flush=True)
            continue
        print(f"\n== {part.name}: at most {limit:.0f} s", flush=True)
        results["parts"][part.name] = runner.run(part, limit)
        write_results(results)
    print(f"\n{table(results)}", flush=True)
    missing = [part.name for part in PARTS if part.name not in results["parts"]]
    bad = [row for rows in results["parts"].values() for row in rows if row["outcome"] in ("failed", "not reached")]
    return 1 if missing or bad else 0


def look_for_card(asked: str | None) -> tuple[str, str]:
    """The device to use and its name, asked of another process: this one must not touch the card before it forks."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
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
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
        self.forks = True
        self.forks = self.ended_within(60, ["-c", f"import torch; torch.ones(1, device={device!r})"]) == 0

    def run(self, part: Part, limit: float) -> list[Row]:
        """The rows of a part; for what was not reached before the limit, rows that say so."""
        with tempfile.TemporaryDirectory(prefix="harness-gpu-") as folder:
            found = Path(folder) / "found"
            began = time.monotonic()
            code = self.ended_within(limit, self.argv(part, found))
            seconds = round(time.monotonic() - began, 1)
            text = found.read_text(encoding="utf-8") if found.exists() else ""
        read = json.loads(text or "[]") if part.benchmark else [json.loads(line) for line in text.splitlines()]
        rows = [row for row in read if "name" in row]
        chosen = [part.benchmark or part.name, *(name for row in read for name in row.get("chosen", []))]
        reached = {row["name"] for row in rows} | ({part.name} if rows else set())
        why = f"the part ended after {seconds} s of {limit:.0f}, with exit code {code}"
        left = [name for name in chosen if name not in reached]
        return rows + [
            {"name": name, "outcome": "not reached", "seconds": 0, "figures": {}, "why": why} for name in left
        ]

    def argv(self, part: Part, found: Path) -> list[str]:
        if part.benchmark:
            return ["-m", "tests.benchmarks", "gpu", part.benchmark, f"--device={self.device}", f"--json={found}"]
        tests = [str(HERE / word) if word.endswith(".py") else word for word in part.tests]
        plugin = ["-p", "tests.gpu.outcomes", f"--outcomes={found}"]
        return ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *plugin, f"--device={self.device}", *tests]

    def ended_within(self, limit: float, argv: Sequence[str]) -> int:
        """Run `python ARGV...`, at the limit tell it to stop, later kill it; returns its exit code."""
        given = {"env": self.env, "cwd": ROOT, "out": sys.stdout, "err": sys.stderr}
        process = fork(argv, **given) if self.forks else start([sys.executable, *argv], **given)
        for told, seconds in ((signal.SIGINT, limit), (signal.SIGKILL, TO_END)):
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, told)
        return process.wait()


def write_results(results: Row) -> None:
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    TABLE.write_text(table(results), encoding="utf-8")
    print(table({**results, "parts": dict(list(results["parts"].items())[-1:])}), flush=True)


def table(results: Row) -> str:
    """The rows in Markdown, for RESULTS.md."""
    used = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"{results['date']}, {results['device']}, commit {results['commit']}, code {results['code']}; {used}.",
        "",
        "| part | test or benchmark | outcome | s | figures |",
        "|---|---|---|---|---|",
    ]
    for name, rows in results["parts"].items():
        for row in rows:
            told = ", ".join(f"{key} {value}" for key, value in row["figures"].items())
            why = row["why"].splitlines()[0][:160] if row["why"] else ""
            cells = (name, row["name"], row["outcome"], row["seconds"], "; ".join(filter(None, (told, why))))
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    tried = [row["outcome"] for rows in results["parts"].values() for row in rows]
    kinds = ("passed", "failed", "not judged", NOT_TRIED, "skipped", "not reached")
    counts = ", ".join(f"{tried.count(kind)} {kind}" for kind in kinds if kind in tried)
    return "\n".join([*lines, "", f"In all: {counts}.", ""])


if __name__ == "__main__":
    sys.exit(main())
