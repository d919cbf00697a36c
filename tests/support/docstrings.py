"""Real labelled text that every Python brings: docstrings of the standard library, labelled by their package."""

from __future__ import annotations

import ast
import json
import sysconfig
from pathlib import Path

# In every Python from 3.10 on, also in those without tkinter.
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
SHORTEST = 40


def of_package(package: str) -> list[str]:
    """The docstrings of a package's functions and classes, each once, in the order of the files."""
    found: dict[str, None] = {}
    folder = Path(sysconfig.get_paths()["stdlib"]) / package
    for path in sorted(folder.rglob("*.py")):
        if "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a fixture of lib2to3 or the like
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST:
                    found[text] = None
    return list(found)


def write(folder: Path, *, most: int) -> tuple[Path, Path, float]:
    """Training and validation files (every fifth text), and the share of the commonest label in the latter."""
    texts = {package: of_package(package)[:most] for package in PACKAGES}
    rows = [{"text": text, "label": package} for package, found in texts.items() for text in found]
    parts = {
        "train": [r for i, r in enumerate(rows) if i % 5],
        "validation": [r for i, r in enumerate(rows) if not i % 5],
    }
    paths = []
    for name, part in parts.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        paths.append(path)
    labels = [row["label"] for row in parts["validation"]]
    return paths[0], paths[1], max(labels.count(label) for label in labels) / len(labels)
