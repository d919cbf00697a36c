"""The shape of the source: imports point down, importing does nothing, files and functions stay readable."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HARNESS = ROOT / "harness"
# From the bottom up; a package stands for its files.
LAYERS = (
    ("masking", "signals"),
    ("errors",),
    ("files",),
    ("config",),
    ("slurm", "agent"),
    ("distributed",),
    ("model",),
    ("tasks",),
    ("training",),
    ("data",),
    ("checkpoint", "fitting"),
    ("tracking",),
    ("export",),
    ("flags",),
    ("session",),
    ("snapshot", "resume", "results"),
    ("loop",),
    ("build",),
    ("execute",),
    ("train",),
    ("sweep",),
    ("commands",),
    ("__init__", "__main__"),
)  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(HARNESS.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
# A new version of wandb is checked against these two.
USES_PRIVATE_PARTS = {"tracking/client.py", "tracking/rows/wandb_file.py"}
PRIVATE_MODULES = ("wandb.sdk", "wandb.proto", "wandb.apis")
LONGEST_FILE, LONGEST_FUNCTION = 500, 60
MOST_FILES = 16  # Python files in a folder
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FOLDERS = sorted({path.parent for path in [*FILES, *TESTS]})
# With the reason why they are one concern.
LONGER_FILES: dict[str, str] = {}
TOP_LEVEL = {
    "harness",
    "launch_configs",
    "tests",
    "slurm",
    "pyproject.toml",
    "README.md",
    "README.ko.md",
    "LICENSE",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
}  # fmt: skip
DEPENDENCIES = {
    "PIL",
    "accelerate",
    "datasets",
    "deepspeed",
    "evaluate",
    "huggingface_hub",
    "liger_kernel",
    "numpy",
    "optuna",
    "peft",
    "psutil",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "trackio",
    "wandb",
    "yaml",
}  # fmt: skip


def name_of(path: Path) -> str:
    """The file, or the package it belongs to: the unit of a layer."""
    return path.relative_to(HARNESS).parts[0].removesuffix(".py")


def relative(path: Path) -> str:
    return str(path.relative_to(HARNESS))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            if node.module == "harness":
                yield from (f"harness.{alias.name}" for alias in node.names)


def test_every_file_stands_in_a_layer() -> None:
    assert {name_of(path) for path in FILES} - {"recipes"} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    own = name_of(path)
    for module in imported(TREES[path]):
        parts = module.split(".")
        if parts[0] != "harness" or len(parts) == 1:
            continue
        other = parts[1]
        same_package = other == own and (HARNESS / own).is_dir()
        assert same_package or LEVEL[other] < LEVEL[own], f"{own} imports {module}"


def test_no_files_import_each_other() -> None:
    """In a circle, functions' imports counted too."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    left = {name: {other for other in imported(TREES[path]) if other in names} for name, path in names.items()}
    for name, others in left.items():
        others -= {name, *(name.rsplit(".", i)[0] for i in range(1, 4))}  # a package stands for what it holds
    while ends := [name for name, others in left.items() if not others & left.keys()]:
        for name in ends:
            del left[name]
    assert not left


def test_tests_are_not_imported() -> None:
    assert not [path for path in FILES if any(m.split(".")[0] == "tests" for m in imported(TREES[path]))]


def test_no_test_imports_another() -> None:
    """What tests share stands in `tests/support/`."""
    for path in TESTS:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        named = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        modules += [f"{node.module}.{alias.name}" for node in named for alias in node.names]
        assert not [name for name in modules if re.match(r"(tests\b.*\.)?test_", name)], path


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_can_be_taken_in_at_a_glance(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= MOST_FILES


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_wandb_is_imported_inside_functions_of_tracking_only(path: Path) -> None:
    tree = TREES[path]
    everywhere = [m for m in imported(tree) if m.split(".")[0] == "wandb"]
    inside = [
        m
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for m in imported(node)
        if m.split(".")[0] == "wandb"
    ]
    if name_of(path) == "tracking":
        assert set(everywhere) == set(inside)
    else:
        assert everywhere == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_private_parts_of_wandb_are_used_in_two_files_only(path: Path) -> None:
    if relative(path) in USES_PRIVATE_PARTS:
        return
    assert not [m for m in imported(TREES[path]) if m.startswith(PRIVATE_MODULES)]
    # Who else has a run or an api in hand; the shells' completion has argparse's parsers.
    if name_of(path) in ("tracking", "commands") and relative(path) != "commands/completion.py":
        private = [
            node.attr
            for node in ast.walk(TREES[path])
            if isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
            and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        ]
        assert private == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_the_environment_is_read_in_few_places(path: Path) -> None:
    reads = [
        node.lineno
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and node.attr in ("environ", "getenv", "putenv")
    ]
    may_read = ("distributed", "slurm", "agent", "config", "tracking", "sweep", "commands", "masking")
    assert not reads or name_of(path) in may_read, f"lines {reads}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_signals_and_asserts_and_globals_stay_out(path: Path) -> None:
    tree = TREES[path]
    assert not any(m == "signal" for m in imported(tree)) or relative(path) in ("training/stopping.py", "signals.py")
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, (ast.Assert, ast.Global))]


def test_no_file_shadows_a_module() -> None:
    installed = {name.partition(".")[0] for name in importlib.metadata.packages_distributions()} & DEPENDENCIES
    assert installed
    for path in HARNESS.iterdir():
        name = path.name.removesuffix(".py")
        if name != "__init__" and (path.suffix == ".py" or path.is_dir()):
            assert name not in sys.stdlib_module_names, name
            assert name not in DEPENDENCIES, name


def test_the_script_holds_functions_only() -> None:
    assert not [node.name for node in ast.walk(TREES[HARNESS / "train.py"]) if isinstance(node, ast.ClassDef)]


IMPORT_ALL = """
import json, logging, os, random, sys, threading, signal
import accelerate, datasets, numpy, torch, transformers, transformers.trainer, accelerate.tracking
from transformers import Trainer, HfArgumentParser, get_scheduler, AutoModelForCausalLM
import tokenizers, pydoc_data.topics, scipy.stats, sklearn.metrics

def snapshot():
    names = ("", "harness", "transformers", "datasets", "accelerate")
    loggers = [logging.getLogger(name) for name in names]
    return {
        "handlers": [[repr(handler) for handler in logger.handlers] for logger in loggers],
        "levels": [logger.level for logger in loggers],
        "environment": dict(os.environ),
        "random": repr(random.getstate()) + str(torch.get_rng_state().sum()) + str(numpy.random.get_state()[2]),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "group": torch.distributed.is_initialized(),
        "folder": os.listdir("."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads of torch": torch.get_num_threads(),
    }

before = snapshot()
for name in sys.argv[1:]:
    __import__(name)
after = snapshot()
print(json.dumps({
    "changed": {key: [before[key], after[key]] for key in before if before[key] != after[key]},
    "imported": all(name in sys.modules for name in sys.argv[1:]),
    "wandb": "wandb" in sys.modules,
    "accelerator": bool(accelerate.state.PartialState._shared_state),
}))
"""


def test_importing_does_nothing_else(tmp_path: Path) -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
    command = [sys.executable, "-c", IMPORT_ALL, *modules]
    # transformers prints a line to stdout when it is imported with WANDB_MODE=offline.
    clean = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, env=clean)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert len(ended.stdout.splitlines()) == 1, ended.stdout
    found = json.loads(ended.stdout)
    assert found == {"changed": {}, "imported": True, "wandb": False, "accelerator": False}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_and_functions_fit_on_a_screen_or_few(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE or relative(path) in LONGER_FILES, f"{lines} lines"
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


def test_longer_files_are_still_longer() -> None:
    for name in LONGER_FILES:
        assert len((HARNESS / name).read_text(encoding="utf-8").splitlines()) > LONGEST_FILE, name


def test_top_level_holds_what_it_should() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL


def test_the_oldest_environment_has_the_lower_bounds() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = [re.search(rf"^{name} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL) for name in ("dependencies", "test")]
    bounds = {bound for found in lists if found for bound in re.findall(r'"([\w.-]+)>=([\d.]+)', found[1])}
    assert len(bounds) > 20
    pins = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    assert pins == sorted(f"{name}=={version}" for name, version in bounds)
    others = {
        name: version for name, version in re.findall(r'"([\w.-]+)>=([\d.]+)', text) if f"{name}=={version}" not in pins
    }
    assert not set(others) & {name for name, _ in bounds}, "an extra has another bound"
