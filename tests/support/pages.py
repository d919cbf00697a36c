"""The README as tests read it: its blocks and its commands, and the flags that a page may name."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from harness.flags import SECTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAGS = {field.name for section in SECTIONS for field in fields(section)}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
