"""Find the `accelerate launch` that started this process, with its flags and launch config, for error messages."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.masking import masked_words

LAUNCHERS, COMMANDS = ("accelerate", "accelerate-launch", "torchrun"), ("harness", "harness-train")
# Keys of the launch config, and the flags of the launcher that set the same.
SAME_AS = {"distributed_type": ("multi_gpu", "use_deepspeed", "use_fsdp", "cpu"), "use_cpu": ("cpu",)}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """An `accelerate launch`: the flags it was given, its launch config, and the file of the config, if any."""

    flags: Mapping[str, Any]
    config: Mapping[str, Any]
    path: Path | None

    @property
    def num_processes(self) -> int | None:
        """The number of processes that were asked for on all machines together; None if it was not given."""
        asked = self.flags.get("num_processes", self.config.get("num_processes"))
        return asked if isinstance(asked, int) and asked > 0 else None

    @property
    def uses_cpu(self) -> bool:
        """Whether it asks for training on the CPU whatever devices there are."""
        return bool(self.flags.get("cpu") or self.config.get("use_cpu"))

    @property
    def gpu_ids(self) -> str | None:
        """The devices that all processes of a machine see; None if they were not chosen."""
        chosen = str(self.flags.get("gpu_ids", self.config.get("gpu_ids")))
        return None if chosen in ("None", "all") else chosen

    @property
    def compile_backend(self) -> str:
        """The backend of torch.compile that it asks for; empty without."""
        section = self.config.get("dynamo_config") or {}
        found = [self.flags.get("dynamo_backend"), section.get("dynamo_backend"), section.get("backend")]
        backend = next((each for each in [*found, self.config.get("dynamo_backend")] if each), None)
        return "" if str(backend).lower() in ("no", "none", "false") else str(backend)

    @property
    def uses_mpi(self) -> bool:
        """Whether mpirun starts the processes."""
        return bool({"mpirun_hostfile"} & {*self.flags, *(self.config.get("mpirun_config") or {})})

    def where(self, key: str) -> str:
        """Return where `key` was given, for an error message: the flag, or file and line."""
        for flag in (key, *SAME_AS.get(key, ())):
            if flag in self.flags:
                return f"--{flag} of accelerate launch"
        deepspeed = (self.config.get("deepspeed_config") or {}).get("deepspeed_config_file")
        for path in [path for path in (self.path, deepspeed and Path(deepspeed)) if path]:
            for number, line in enumerate(_lines(path), start=1):
                if re.match(rf'\s*"?{re.escape(key)}"?\s*:', line):
                    return f"`{key}` in {path}, line {number}"
        return f"`{key}`, which {self.path} does not have" if self.path else f"`{key}` (accelerate launch --help)"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def find_launch() -> Launch | None:
    """
    Return the `accelerate launch` that this process descends from; None if it was started otherwise.

    The launcher passes on what it decided but not what it was told: that is read from its command line.
    """
    arguments = next((found for found in map(launcher_arguments, _parents()) if found is not None), None)
    return None if arguments is None else read_launch(arguments)


def launcher_arguments(command: Sequence[str]) -> Sequence[str] | None:
    """Return the arguments of `accelerate launch` in a command line; None if this is another command."""
    for i, word in enumerate(command[:8]):  # the command follows python, its options and the script or module
        name = Path(word).name
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and command[i + 1 : i + 2] == ["launch"]:
            return command[i + 2 :]
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[i + 1 :]
    return None


def read_launch(arguments: Sequence[str]) -> Launch | None:
    """Parse a command line of `accelerate launch` as the launcher does; None if this version of accelerate can't."""
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    try:
        parsed = launch_command_parser().parse_args([*arguments])
    except SystemExit:  # launched by another version
        return None
    flags = {name: getattr(parsed, name) for name in parsed.nondefault}
    path: Path | None = Path(parsed.config_file or default_config_file)
    if parsed.config_file is None and (parsed.cpu or not Path(default_config_file).is_file()):
        path = None
    try:
        config = {} if path is None else yaml.safe_load("\n".join(_lines(path)))
    except yaml.YAMLError:
        config = {}
    return Launch(flags=flags, config=config if isinstance(config, dict) else {}, path=path)


@dataclass(frozen=True, kw_only=True)
class TypedCommand:
    """A command as somebody typed it: its `words` up to the flags of the training, and these flags."""

    words: Sequence[str]
    flags: Sequence[str]

    def with_flags(self, flags: Sequence[str]) -> str:
        """Return it as a line for a shell, with `flags` in place of the same ones; without secrets."""
        replaced = {*flags[::2], "--wandb_fork"}  # given again, it would make another run
        kept: list[str] = []
        skips = False
        for word in self.flags:
            if word.startswith("--"):
                skips = word.partition("=")[0].replace("-", "_").replace("__", "--", 1) in replaced
            kept += [] if skips else [word]
        return shlex.join([*self.words, *masked_words([*kept, *flags])])


def typed_command(flags: Sequence[str]) -> TypedCommand:
    """Find how this process was started with the flags of a training: by a launcher, by Python, or as a command."""
    for command in (*filter(is_launcher, _parents()), sys.orig_argv):
        at = len(command) - len(flags)
        if at > 0 and list(command[at:]) == list(flags):
            is_command = len(command) > 1 and Path(command[1]).name in (*LAUNCHERS, *COMMANDS) and at > 1
            words = [Path(command[1]).name, *command[2:at]] if is_command else command[:at]
            return TypedCommand(words=words, flags=flags)
    return TypedCommand(words=("harness", "train"), flags=flags)


def passes_on(name: str) -> bool:
    """
    Whether torch's launcher, accelerate's too, sends the signal of this name on, and kills its processes after a while.

    SLURM's scripts have it leave SIGTERM to the processes.
    """
    handled = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT")
    return "TORCHELASTIC_RUN_ID" in os.environ and name in handled.split(",")


def shutdown_seconds() -> float:
    """Return how long torch's launcher lets its processes live after it has sent them a signal."""
    for command in filter(is_launcher, _parents()):
        for word, following in zip(command, [*command[1:], ""], strict=True):
            flag, _, value = word.partition("=")
            if flag in ("--shutdown_timeout", "--shutdown-timeout"):
                return float(value or following)
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


def _parents() -> list[list[str]]:
    """The command lines of the processes that this one descends from, the nearest first."""
    import psutil

    try:
        return [process.cmdline() for process in psutil.Process().parents()]
    except psutil.Error:
        return []


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is one of accelerate's launcher or of torchrun."""
    by_torch = any(Path(word).name in ("torchrun", "torch.distributed.run") for word in command[:4])
    return by_torch or launcher_arguments(command) is not None


def where(key: str) -> str:
    """Return where the launch gives `key`, for an error message."""
    launch = find_launch()
    return f"`{key}` of the launch config" if launch is None else launch.where(key)
