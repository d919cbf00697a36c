"""
The pages as tests read them: blocks, commands, tables, and the flags that a page may name.

`python -m tests.support.pages` writes the tables that are made from the code anew.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

from harness.flags import GONE, REFUSED
from tests.support.wandb.differences import DIFFERENCES

ROOT = Path(__file__).parents[2]
NAMES = (
    "README.md",
    "README.ko.md",
    "CONTRIBUTING.md",
    ".github/SECURITY.md",
    "launch_configs/README.md",
    "slurm/README.md",
)
PAGES = {name: ROOT / name for name in NAMES}
PAGES |= {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "harness").rglob("README.md"))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
README, MAP, TRACKING = TEXTS["README.md"], TEXTS["harness/README.md"], TEXTS["harness/tracking/README.md"]


def blocks(language: str, page: str = README) -> list[str]:
    """The fenced blocks of a page in a language, indented ones too."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def commands(page: str = README) -> list[str]:
    """What a page says to type: the lines of its bash blocks, and whole commands of ours in its tables."""
    typed = [line for block in blocks("bash", page) for line in block.replace("\\\n", " ").splitlines()]
    in_tables = [code for line in page.splitlines() if line.startswith("|") for code in re.findall(r"`([^`]+)`", line)]
    typed += [code for code in in_tables if re.match(r"harness \w+ .*--", code) and "..." not in code]
    return [line for line in typed if line.strip() and not line.startswith("#")]


def section(title: str, page: str = README) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    level = len(title) - len(title.lstrip("#"))
    return re.split(rf"^#{{1,{level}}} ", page.split(f"\n{title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def refused_rows() -> list[str]:
    """The table of refused flags; those with one remedy share a row."""
    by_remedy: dict[str, list[str]] = {}
    for flag, remedy in sorted({**REFUSED, **GONE}.items()):
        by_remedy.setdefault(remedy, []).append(f"`--{flag}`")
    return ["| flags | why, or what to do |", "|---|---|", *(f"| {', '.join(f)} | {r} |" for r, f in by_remedy.items())]


def layer_rows() -> list[str]:
    """The table of layers, the top one first, as tests/test_layout.py has them."""
    tree = ast.parse((ROOT / "tests" / "test_layout.py").read_text(encoding="utf-8"))
    (layers,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "LAYERS"
    ]
    shown = [", ".join(_file_or_folder(name) for name in names) for names in reversed(layers)]
    return [
        "| layer | in `harness/` |",
        "|---|---|",
        *(f"| {len(shown) - i} | {names} |" for i, names in enumerate(shown)),
    ]


def difference_rows() -> list[str]:
    """The table of what W&B has of a training by harness and by the Trainer."""
    head = ["| what | Trainer | harness | why |", "|---|---|---|---|"]
    return [*head, *(difference.as_markdown() for difference in DIFFERENCES.values())]


def _file_or_folder(name: str) -> str:
    return f"`{name}/`" if (ROOT / "harness" / name).is_dir() else f"`{name}.py`"


def made_rows() -> Mapping[tuple[str, str], list[str]]:
    """The tables that are made from the code, by page and heading: the last table under it."""
    return {
        ("harness/README.md", "## Differences from the Trainer"): refused_rows(),
        ("harness/tracking/README.md", "## Differences from the Trainer's"): difference_rows(),
        ("CONTRIBUTING.md", "## Layers"): layer_rows(),
    }


def last_table(text: str) -> list[str]:
    """The last table of a text."""
    found: list[list[str]] = []
    for line, before in zip(text.splitlines(), ["", *text.splitlines()], strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append(line)
    return found[-1]


def main() -> None:
    """Write the tables anew."""
    for (name, title), made in made_rows().items():
        text = PAGES[name].read_text(encoding="utf-8")
        under = section(title, text)
        new = under.replace("\n".join(last_table(under)), "\n".join(made))
        PAGES[name].write_text(text.replace(under, new), encoding="utf-8")


if __name__ == "__main__":
    main()
