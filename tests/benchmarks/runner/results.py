"""What benchmarks have found: a file that is whole after each of them, and the machine that found it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.files import write_whole
from tests.benchmarks.contest import ROOT, shown

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "wandb", "lightning", "trl")
Outcome = dict[str, Any]


@dataclass
class Results:
    """The outcomes of benchmarks, by device and name, as they stand in the file."""

    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """What a file holds; nothing, if there is none."""
        return cls(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_whole(path, json.dumps(self.outcomes, indent=1) + "\n")

    def add(self, device: str, name: str, outcome: Outcome) -> None:
        """Take the outcome of a benchmark, in place of an older one."""
        by_name = self.outcomes.setdefault(device, {})
        by_name[name] = outcome
        self.outcomes[device] = dict(sorted(by_name.items()))

    def of(self, device: str, names: Sequence[str]) -> Results:
        """Those of these benchmarks alone."""
        return Results({device: {name: self.outcomes[device][name] for name in names}})

    @property
    def all_hold(self) -> bool:
        """Whether none failed and every bound holds."""
        every = [outcome for by_name in self.outcomes.values() for outcome in by_name.values()]
        return not any(outcome["error"] or any(not holds(each) for each in outcome["results"]) for outcome in every)


def holds(result: Mapping[str, Any]) -> bool:
    """Whether every bound of a result, of a curve or of one of the set for a card holds."""
    if "outcome" in result:
        return bool(result["outcome"] != "failed")
    return all(bound["holds"] for bound in result["bounds"]) if "bounds" in result else bool(result["holds"])


def as_text(name: str, outcome: Outcome) -> str:
    """An outcome for a terminal; the set for a card has printed its own."""
    lines = [f"== {name}: {outcome['seconds']} s{': ' * bool(outcome['error'])}{outcome['error']}"]
    results = [result for result in outcome["results"] if "outcome" not in result]
    return "\n".join([*lines, *([shown(results)] if results else [])])


def now() -> str:
    return datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0")


def machine(device: str) -> str:
    """Processor, cores, memory and card; no name of the machine."""
    parts = [f"{_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB"]
    if device == "cuda":
        import torch

        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def versions() -> str:
    """Python and what a figure depends on."""
    lines = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(lines)


def commit() -> str:
    """The commit of this checkout, with a + where files were changed since; "unknown" for a copy without history."""
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:  # another system
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
