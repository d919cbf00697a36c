"""`harness completion bash | zsh | tcsh`: print a script with which the shell completes commands, flags and choices."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from importlib import import_module

from harness.commands import Parser
from harness.train import show

SHELLS = ("bash", "zsh", "tcsh")
COMMANDS = ("sync", "export", "submit", "link", "sweep", "completion")
# Names of what is a path, or may be one.
PATH = re.compile(r".*(file|dir|path|config|checkpoint|out)")


def parser() -> Parser:
    """Return the command's parser."""
    own = Parser(
        "completion",
        description="Print the completion of a shell, for its start-up file or for where it looks for such.",
        epilog='bash, at once: eval "$(harness completion bash)"; for good: harness completion bash > '
        "~/.local/share/bash-completion/completions/harness; zsh: into the file _harness in a folder of fpath.",
    )
    own.add_argument("shell", choices=SHELLS)
    return own


def run(argv: Sequence[str]) -> int:
    """Print the script; returns the exit code."""
    given = parser().parse_args(argv)
    import shtab

    show(f"{shtab.complete(_whole(), shell=given.shell)}\n")
    return 0


def _whole() -> argparse.ArgumentParser:
    """Return one parser with all commands, the training's flags included."""
    whole = argparse.ArgumentParser(prog="harness")
    whole.add_argument("--version", action="store_true", help="Which version this is.")
    commands = whole.add_subparsers(title="commands")
    training = commands.add_parser("train", help="Train, evaluate, predict.")
    _add_flags(training)
    for name in COMMANDS:
        own = import_module(f"harness.commands.{name}").parser()
        command = commands.add_parser(name, parents=[own], add_help=False, help=own.description)
        if name == "submit":
            _add_flags(command)
    _complete_paths(commands.choices.values())
    return whole


def _add_flags(command: argparse.ArgumentParser) -> None:
    from harness.config import flags_of
    from harness.flags import SECTIONS

    for flag in flags_of(*SECTIONS).values():
        takes_none = flag.type is bool or flag.bare is not None
        command.add_argument(f"--{flag.name}", nargs="?" if takes_none else None, help=flag.help.replace("%", "%%"))


def _complete_paths(commands: Iterable[argparse.ArgumentParser]) -> None:
    import shtab

    for command in commands:
        for action in command._actions:
            if PATH.fullmatch(action.dest) and action.choices is None and action.nargs != 0:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
