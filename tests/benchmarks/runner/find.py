"""Which benchmarks there are: read from their sources, so that a list of them imports no library."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1]
DEVICES = ("cpu", "cuda")
GPU = "gpu"


@dataclass(frozen=True)
class Benchmark:
    """A module of tests.benchmarks by its dotted name there, what its docstring says first, and where it runs."""

    name: str
    module: str
    about: str
    devices: tuple[str, ...]


def found() -> dict[str, Benchmark]:
    """All of them by name, and the set for a card, which has a folder and a command of its own."""
    benchmarks = [each for path in sorted(FOLDER.rglob("*.py")) if (each := read(path)) is not None]
    about = _about(ast.parse((FOLDER / GPU / "__main__.py").read_text(encoding="utf-8")))
    benchmarks.append(Benchmark(GPU, GPU, about, DEVICES[1:]))
    return {each.name: each for each in sorted(benchmarks, key=lambda each: each.name)}


def read(path: Path) -> Benchmark | None:
    """The benchmark in a file; None if it has no `measure(device, repeats)`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not any(isinstance(node, ast.FunctionDef) and _measures(node) for node in tree.body):
        return None
    devices = DEVICES[:1]
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "DEVICES":
            devices = tuple(ast.literal_eval(node.value))
    module = ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    return Benchmark(path.stem, module, _about(tree), devices)


def listed() -> str:
    """A line for each, for a terminal."""
    every = found().values()
    width = max(len(each.name) for each in every)
    return "\n".join(f"{each.name:{width}}  {each.about}" for each in every)


def _measures(node: ast.FunctionDef) -> bool:
    return node.name == "measure" and [each.arg for each in node.args.args] == ["device", "repeats"]


def _about(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").partition("\n")[0]
