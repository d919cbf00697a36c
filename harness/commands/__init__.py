"""
The commands besides the training: `harness sync | export | submit | link | sweep | completion`.

A module here has `parser()`, which imports nothing slow, and `run(argv)`, which returns the exit code and raises
HarnessError for `harness/__main__.py` to print.
"""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from harness.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """The parser of `harness COMMAND`: it raises ConfigError instead of ending the process."""

    def __init__(self, command: str, **options: Any) -> None:
        super().__init__(prog=f"harness {command}", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Refuse a command line by a ConfigError."""
        raise ConfigError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")
