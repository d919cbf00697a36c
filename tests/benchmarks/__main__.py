"""
The benchmarks of this folder: `python -m tests.benchmarks` lists them, `python -m tests.benchmarks NAME ...` runs one.

`gpu` is a set of its own, for a card and the CPU alike: see tests/benchmarks/gpu/__main__.py.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

NAMES = sorted({*(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem[0] != "_"), "gpu"})


def listed() -> str:
    lines = []
    for name in NAMES:
        path = Path(__file__).with_name(name)
        source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        about = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        lines.append(f"{name:18} {about.splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(f"python -m tests.benchmarks NAME ...\n\n{listed()}")
        sys.exit(0 if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help") else 2)
    del sys.argv[0]  # the benchmark reads its own arguments
    runpy.run_module(f"tests.benchmarks.{sys.argv[0]}", run_name="__main__", alter_sys=True)
