"""The command line of a trial: what stands before `harness train`, and the flags that all trials have."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

ARGS = ("${args}", "${args_no_boolean_flags}")
MACROS = {"${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], **{name: [] for name in ARGS}}
TRAINING = ("-m", "harness", "train")
SCRIPTS = ("harness/train.py", "harness-train")


@dataclass(frozen=True, kw_only=True)
class Command:
    """The words before the training's own (empty: this Python), and flags that the file gives to all trials."""

    launcher: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def with_launcher(self, text: str | None) -> Command:
        """Return it with the launcher that was typed, if one was. Raises ConfigError for one that is not there."""
        if text is None:
            return self
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"--launcher={text}: {error}.") from None
        return replace(self, launcher=tuple(words)).checked()

    def checked(self) -> Command:
        """Return it. Raises ConfigError if its program is not there."""
        if self.launcher and shutil.which(self.launcher[0]) is None:
            raise ConfigError(f"The launcher {self.launcher[0]} is not on the PATH: write it as in a shell.")
        return self

    def words(self, flags: Sequence[str]) -> list[str]:
        """Return the whole command line of a training with these flags."""
        return [*(self.launcher or (sys.executable,)), *TRAINING, *flags]


def command_of(raw: Mapping[Any, Any]) -> Command:
    """Return what `program` and `command` of a sweep file mean. Raises ConfigError."""
    program = raw.get("program")
    if program is not None and not _is_training([str(program)]):
        raise ConfigError(f"program: {program} is not run here, trials are by `harness train`; leave it out.")
    given = raw.get("command")
    if given is None:
        return Command()
    if not isinstance(given, list) or not all(isinstance(word, str | int | float) for word in given):
        raise ConfigError("command: write a list of words, as for W&B's agent.")
    words: list[str] = [word for each in map(str, given) for word in _expanded(each, program)]
    if not {*map(str, given)} & {*ARGS}:
        raise ConfigError("command: it has no ${args}, so all trials would be the same.")
    for i in range(len(words)):
        if (length := _is_training(words[i:])) > 0:
            before = words[:i]
            return Command(launcher=tuple(_without_python(before, length)), flags=tuple(words[i + length :])).checked()
    raise ConfigError("command: it starts no training; write e.g. [accelerate, launch, -m, harness, train, ${args}].")


def _expanded(word: str, program: Any) -> list[str]:
    if word == "${program}":
        if program is None:
            raise ConfigError("command: ${program} needs `program`; write -m harness train in its place.")
        return [str(program)]
    if word.startswith("${") and word not in MACROS:
        raise ConfigError(f"command: {word} is not taken; use {', '.join([*MACROS, '${program}'])}.")
    return MACROS.get(word, [word])


def _is_training(words: Sequence[str]) -> int:
    """Return how many words name our training, 0 if they do not."""
    if tuple(words[:3]) == TRAINING:
        return 3
    if words and (Path(words[0]).name == SCRIPTS[1] or Path(words[0]).as_posix().endswith(SCRIPTS[0])):
        return 1
    return 2 if len(words) > 1 and Path(words[0]).name == "harness" and words[1] == "train" else 0


def _without_python(before: Sequence[str], length: int) -> list[str]:
    """Return the launcher; where the training was a command of its own, with the Python that `-m` needs."""
    return [*before, sys.executable] if before and length == 2 else [*before]
