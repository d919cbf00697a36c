"""
The training script: parse the flags, load the libraries, run, and turn an error into an exit code.

`harness train`, `harness-train`, `python harness/train.py` and `python -m harness.train` are the same; with several
processes: `accelerate launch harness/train.py`. Exit codes: 0 finished, 1 failed, 2 bad input or configuration, 85
preempted after a save, 130 interrupted: after a save, or at once by a second Ctrl-C.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # As a script: this folder would come first on the path and its files hide modules; its parent belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from harness.signals import (
    INTERRUPTED_EXIT_CODE,
    end_preparation,
    leave_word_to_others,
    lost_output,
    prepare_command,
    say,
)

if __name__ == "__main__":
    prepare_command()  # before any slower import

import gc
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from harness.agent import sweep_run
from harness.config import is_first_rank
from harness.distributed.flags import environment_kept, hide_accelerators
from harness.distributed.launch import TypedCommand, typed_command
from harness.errors import ConfigError, HarnessError, StoppedError, exit_code_of, meaning_of
from harness.flags import Config, help_text, help_topic, read
from harness.masking import tracebacks_masked
from harness.slurm import slurm_job
from harness.tasks import is_whole, own_builder
from harness.tasks.hub import hub_or_cache

if TYPE_CHECKING:
    from harness.results import Result

SECONDS_FOR_RANK_ZERO = 10.0


def script() -> None:
    """Run as the installed command `harness-train`."""
    prepare_command()  # before torch and transformers are loaded, which takes seconds
    with tracebacks_masked():
        code = main()
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process of a command. After a second Ctrl-C a checkpoint that is being written is not waited for."""
    if code == INTERRUPTED_EXIT_CODE and any(
        not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()
    ):
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code. Errors that are bugs are raised with their traceback."""
    return exit_code_of(partial(_command, sys.argv[1:] if argv is None else argv), _say)


def _command(argv: Sequence[str]) -> int:
    if (topic := help_topic(argv)) is not None:
        show(f"{help_text(topic)}\n")
        return 0
    reading = read(argv, sweep=sweep_run())
    config = reading.config if "print_config" in reading.values else reading.checked()
    if config.run.print_config:
        show(reading.as_yaml(everything=config.run.print_config == "all"))
        return 0
    for note in reading.notes:
        _say(0, note)
    typed = typed_command(argv)  # now: the launcher may have ended before
    try:
        run(config)
    except StoppedError as stopped:
        raise _to_go_on(stopped, typed) from None
    except KeyboardInterrupt as interrupt:
        stopped_by = interrupt.__cause__ or interrupt.__context__  # by a second one while a stop is recorded
        if isinstance(stopped_by, StoppedError):
            raise KeyboardInterrupt(str(_to_go_on(stopped_by, typed))) from None
        raise
    return 0


def _to_go_on(stopped: StoppedError, typed: TypedCommand) -> StoppedError:
    """The same error, with the command that goes on: what was typed, and the flags that it needs."""
    # A job's launcher is its script's; the words of an agent are not typed, and it goes on by itself.
    is_typed = stopped.flags and slurm_job() is None and sweep_run() is None
    return StoppedError(
        stopped.reason,
        exit_code=stopped.exit_code,
        was_preempted=stopped.was_preempted,
        flags=stopped.flags,
        command=typed.with_flags(stopped.flags) if is_typed else "",
    )


def run(config: Sequence[str] | Config, **own: Any) -> Result:
    """
    Collective under a launcher: do what a command line says, or a Config, and return what has come of it.

    `own` are values of a `harness.tasks.Task`'s fields, under the Trainer's names where it has them: model,
    train_dataset, eval_dataset, test_dataset, data_collator, processing_class, compute_loss_func, metrics ... A model
    and a data set are a task of their own; anything else takes the place of what --task builds.

    It may be called again and again, in a notebook too: what it changes of the process (logging, environment, random
    generators, determinism, accelerate's state) is put back. Raises what goes wrong: ConfigError, CheckpointError,
    StoppedError after a stop that saved, KeyboardInterrupt after Ctrl-C, which saves too, and bugs as they are. It
    never exits.
    """
    if isinstance(config, str):
        raise ConfigError(f"harness.run takes a list of words, not the text {config!r}: give {config.split()}.")
    builder = own_builder(own) if own else None
    if not isinstance(config, Config):
        words = [str(word) for word in config]
        reading = read(words, own_task=is_whole(own), sweep=sweep_run(is_strict=False))
        config = reading.checked()
        for note in reading.notes:
            _say(0, note)
    if config.run.print_config:
        raise ConfigError(
            "--print_config is for a command line; in Python there is harness.flags.parse(argv).as_yaml()."
        )
    from_hub = nullcontext() if is_whole(own) else hub_or_cache(config.task, config.run.config)
    with environment_kept(), from_hub:
        _load(config)
        end_preparation()
        from harness.execute import run_command

        try:
            return run_command(config, builder)
        except StoppedError as stopped:
            if stopped.exit_code != INTERRUPTED_EXIT_CODE:
                raise
            raise KeyboardInterrupt(str(stopped)) from stopped
        except RuntimeError as error:
            if (meaning := meaning_of(error)) is None:
                raise
            raise meaning from error


def show(text: str) -> None:
    """Print what was asked for. Raises HarnessError if it can't be written; a reader may end before (`| head`)."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
        lost = lost_output(sys.stdout)
    except BrokenPipeError:  # the unwritten rest must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if lost is not None and not isinstance(lost, BrokenPipeError):
        raise HarnessError(f"The output could not be written: {lost}.")


def _load(config: Config) -> None:
    """Import what a training needs, which takes seconds, after a line that says so."""
    if not is_first_rank():
        leave_word_to_others()
    is_told = config.console.log_level in ("passive", "info", "debug") and is_first_rank()
    if is_told and "torch" not in sys.modules:
        say("Loading torch, transformers and accelerate ...", sys.stderr)
    is_first = "torch" not in sys.modules
    if config.topology.use_cpu and is_first:
        hide_accelerators()
    with uncollected() if is_first else nullcontext():
        if is_first and is_first_rank() and config.run.trains and config.tracking.sends:
            from harness.tracking.client import import_ahead

            import_ahead()
        import harness.execute  # noqa: F401


@contextmanager
def uncollected() -> Iterator[None]:
    """
    Import without garbage collections, and let later ones pass over what is there by then.

    What modules are made of stays, and is many objects: to look through them again and again is a fifth of an import's
    time, and later a pause in the middle of a step.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _say(code: int, message: str) -> None:
    if is_first_rank():
        say(f"harness train: {message}", sys.stderr)
    elif code in (1, 2):
        # Ranks fail together, with one message. A launcher kills all ranks when the first exits: the others give rank
        # zero time to print it. A rank that is still alive after that has failed alone and prints its own message.
        time.sleep(SECONDS_FOR_RANK_ZERO)
        say(f"harness train: {message} (not on rank zero)", sys.stderr)


if __name__ == "__main__":
    with tracebacks_masked():
        code = main()
    leave(code)
