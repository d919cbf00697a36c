"""
The command `harness train | sweep | sync | export | submit | link`; `python -m harness ...` is the same.

A command's module is imported when it is called, so `harness --help` loads no library. Exit codes: 0 done, 1 failed or
something is left to do, 2 bad input, 130 interrupted; for a training also 85, preempted after a save.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import harness
from harness.errors import ConfigError, exit_code_of
from harness.masking import tracebacks_masked
from harness.signals import end_preparation, prepare_command, say


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its line in `harness --help`, and the message after Ctrl-C."""

    help: str
    interrupted: str = "Interrupted."

    def run(self, name: str, argv: Sequence[str]) -> int:
        """Import its module and run it; returns the exit code."""
        if name == "train":
            return int(import_module("harness.train").main(argv))
        end_preparation()
        return int(import_module(f"harness.commands.{name}").run(argv))


COMMANDS = {
    "train": Command(help="Train, evaluate, predict. Under a launcher: accelerate launch -m harness train ..."),
    "sync": Command(
        help="Bring runs to W&B: offline ones, also while they are written, and what online ones could not deliver.",
        interrupted="Interrupted; start it again to go on.",
    ),
    "export": Command(
        help="Write a checkpoint's model as a folder for from_pretrained.",
        interrupted="Interrupted; nothing was written.",
    ),
    "submit": Command(
        help="Check a training and put it into SLURM's queue.", interrupted="Interrupted; nothing was submitted."
    ),
    "link": Command(help="Link an artifact that W&B has to a registry."),
    "sweep": Command(help="Train with many values of some flags and find the best: a grid, at random, or by TPE."),
    "completion": Command(help='Print the completion of a shell: eval "$(harness completion bash)".'),
}


def script() -> None:
    """Run as the installed command `harness`."""
    prepare_command()  # before the imports of a training, which take seconds
    with tracebacks_masked():
        code = main()
    if sys.argv[1:2] == ["train"]:
        import_module("harness.train").leave(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code. Errors that are bugs are raised with their traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    command = COMMANDS.get(name, Command(help=""))

    def tell(_: int, message: str) -> None:
        say(f"harness {name}: {message}" if name in COMMANDS else f"harness: {message}", sys.stderr)

    work = partial(command.run, name, words[1:]) if name in COMMANDS else partial(_without_command, name)
    return exit_code_of(work, tell, interrupted=command.interrupted)


def _without_command(word: str) -> int:
    """Handle `--help` and `--version`. Raises ConfigError for anything else."""
    if word in ("-h", "--help"):
        print(_help())
    elif word == "--version":
        print(f"harness {harness.__version__}")
    elif word.startswith("-"):
        raise ConfigError(f"{word} follows a command, for example: harness train {word} ...")
    else:
        near = difflib.get_close_matches(word, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{word} is not a command; use one of: {', '.join(COMMANDS)}.{hint}")
    return 0


def _help() -> str:
    lines = [f"  {name:12}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: harness COMMAND ...",
            "",
            "Training on Hugging Face Accelerate with the Trainer's flags, numbers and checkpoints.",
            "",
            *lines,
            "",
            "`harness COMMAND --help` says more, `harness --version` which version this is.",
        ]
    )


if __name__ == "__main__":
    script()
