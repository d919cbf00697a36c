"""
On the login node: bring offline runs to W&B while they are written, each row once, whatever dies meanwhile.

`python -m harness.sync DIR... [--until-finished | --once] [--interval SECONDS]`. Exit codes: 0 all is there, 1
something is left, 2 bad input, 130 interrupted. It may be killed and started again at any time.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.checkpoint.lock import SILENCE_SECONDS, is_held
from harness.distributed.ranks import is_running
from harness.errors import BusyError, ConfigError, DeliveryError, RowsError, SyncError, UnreachableError
from harness.tracking.client import one_line, open_api, server_answers
from harness.tracking.run import identity as identities
from harness.tracking.run.identity import IDENTITY_FILE, Identity
from harness.tracking.sync import OfflineRun, Outcome
from harness.training.stopping import PREEMPTED_EXIT_CODE, PREEMPTED_FILE

SOURCE = "python -m harness.sync"
LOCK = "wandb_sync.lock"
# Of a run below a given folder: an output_dir, runs/NAME, sweeps/runs/NAME.
PLACES = (IDENTITY_FILE, f"*/{IDENTITY_FILE}", f"*/*/{IDENTITY_FILE}")
LONGEST_PAUSE_SECONDS = 600.0
GOING, FINISHED, PREEMPTED, INTERRUPTED = "running", "finished", "preempted", "interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        given = _parser().parse_args(argv)
        if given.interval <= 0:
            raise ConfigError(f"--interval={given.interval:g}: give seconds, more than 0.")
        watch = Watch([folder.expanduser() for folder in given.dir])
        watch.check(needs_runs=given.once)
        return watch.follow(interval=given.interval, once=given.once, until_finished=given.until_finished)
    except ConfigError as error:
        return _say_error(2, str(error))
    except UnreachableError as error:
        return _say_error(2, f"{error} Nothing was sent.")
    except KeyboardInterrupt:
        return _say_error(130, "Interrupted; start it again to go on.")


class Watch:
    """The runs in some folders, looked for anew in each round: new ones are taken up."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._api: Any = None
        self._said: dict[Path, str] = {}
        self._whole: dict[Path, object] = {}  # how the files were when all of them had been brought

    def check(self, *, needs_runs: bool) -> None:
        """Raise ConfigError for a folder that is not there, or where there is nothing to do."""
        for folder in self._folders:
            if not folder.is_dir():
                raise ConfigError(f"{folder}: no such folder.")
        found = self._runs()
        online = [output_dir for output_dir, identity in found.items() if identity.mode == "online"]
        if online and len(online) == len(found):
            raise ConfigError(
                f"{online[0]} is an online run; what it could not send is brought by: "
                f"python -m harness.tracking upload {online[0]}"
            )
        if needs_runs and not found:
            names = ", ".join(map(str, self._folders))
            raise ConfigError(
                f"{names}: no run with W&B is here or in a folder below ({IDENTITY_FILE}); "
                "without --once one is waited for."
            )

    def follow(self, *, interval: float, once: bool, until_finished: bool) -> int:
        """Go round until it is enough; returns the exit code. Raises UnreachableError before the first round."""
        failures = 0
        while True:
            try:
                if self._api is None:
                    self._api = open_api(SOURCE, silent=True)
                states = self.round()
                is_reached = True
            except UnreachableError as error:
                if once or "credentials" in str(error):
                    raise
                _say(f"{error} It is tried again.")
                states, is_reached = {}, False
            done = [state == FINISHED and output_dir in self._whole for output_dir, state in states.items()]
            if once and is_reached:
                return 0 if all(output_dir in self._whole for output_dir in states) else 1
            if until_finished and done and all(done):
                _say(f"All {len(done)} runs are finished, and W&B has all of them.")
                return 0
            failures = 0 if is_reached else failures + 1
            time.sleep(min(interval * 2**failures, max(interval, LONGEST_PAUSE_SECONDS)))

    def round(self) -> dict[Path, str]:
        """Bring what is new of each run; returns how each is. Raises UnreachableError."""
        states = {}
        for output_dir, identity in self._runs().items():
            if identity.mode == "online":
                continue
            identity = identities.read(output_dir) or identity  # bringing the runs before may have taken long
            states[output_dir] = state = _state(output_dir, identity)
            run = OfflineRun(output_dir, identity)
            before = _signature(run, state)
            if self._whole.get(output_dir) == before:
                continue
            self._whole.pop(output_dir, None)
            outcome = self._deliver(run, state)
            if outcome is None:
                continue
            self._tell(output_dir, _described(outcome, state, identity.exit_code))
            if outcome.is_whole:
                self._whole[output_dir] = before
        if not states and not self._said:
            self._tell(self._folders[0], "no offline run yet; waiting")
        return states

    def _runs(self) -> dict[Path, Identity]:
        found: dict[Path, Identity] = {}
        for folder in self._folders:
            for path in sorted(path for place in PLACES for path in folder.glob(place)):
                identity = identities.read(path.parent)
                if identity is not None:
                    found.setdefault(path.parent.absolute(), identity)
        return found

    def _deliver(self, run: OfflineRun, state: str) -> Outcome | None:
        """What was brought; None if that failed, which is said. Raises UnreachableError."""
        try:
            with _alone(run.output_dir) as lock:
                return run.deliver(self._api, is_over=state != GOING, is_finished=state == FINISHED, lock=lock)
        except BusyError:
            self._tell(run.output_dir, "another harness.sync is at work here")
        except Exception as error:  # wandb and its transports raise many types, and the other runs go on
            base_url = self._api.settings["base_url"]
            if not server_answers(base_url):
                raise UnreachableError(f"W&B can't be reached at {base_url}.") from error
            is_own = isinstance(error, RowsError | SyncError | DeliveryError)
            self._tell(run.output_dir, f"not brought: {error if is_own else one_line(error)}")
        return None

    def _tell(self, output_dir: Path, what: str) -> None:
        if self._said.get(output_dir) != what:
            _say(f"{output_dir}: {what}")
        self._said[output_dir] = what


def _state(output_dir: Path, identity: Identity) -> str:
    """How the training is: by its lock, its marker and how its last life has ended."""
    held = is_held(output_dir)
    if held is None and identity.exit_code is None:  # a loop of the user's own has no lock
        processes = identity.processes
        if processes and processes["host"] == platform.node():
            held = is_running(*processes["owner"])
        else:
            held = _is_written(output_dir, identity)
    if held:
        return GOING
    # The script of a job takes the marker away before its next life opens the run.
    if identity.exit_code == PREEMPTED_EXIT_CODE or (output_dir / PREEMPTED_FILE).exists():
        return PREEMPTED
    return INTERRUPTED if identity.exit_code is None else FINISHED


def _is_written(output_dir: Path, identity: Identity) -> bool:
    """Whether wandb's process, which writes every some seconds, has written lately."""
    changed_at = [path.stat().st_mtime for path in OfflineRun(output_dir, identity).files()]
    return bool(changed_at) and time.time() - max(changed_at) < SILENCE_SECONDS


def _signature(run: OfflineRun, state: str) -> object:
    stats = [(path, path.stat()) for path in run.files()]
    return state, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _described(outcome: Outcome, state: str, exit_code: int | None) -> str:
    ended = f"ended with exit code {exit_code}" if state == FINISHED and exit_code else state
    parts = [ended, f"{outcome.rows} rows in W&B"]
    if outcome.unsent_rows:
        reason = "not yet in wandb's file" if state == GOING else "brought when the training goes on"
        parts.append(f"{outcome.unsent_rows} pending ({reason})")
    if outcome.num_delivered:
        parts.append(f"{outcome.num_delivered} artifacts brought")
    if outcome.num_waiting:
        parts.append(f"{outcome.num_waiting} artifacts pending")
    if state in (PREEMPTED, INTERRUPTED):
        parts.append("waits for its next life")
    return ", ".join([*parts, *outcome.problems])


@contextmanager
def _alone(output_dir: Path) -> Iterator[int | None]:
    """A lock that ends with this process and the `wandb sync` that it started. Raises BusyError, OSError."""
    descriptor = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError from error
        except OSError:  # a file system without locks
            yield None
            return
        yield descriptor
    finally:
        os.close(descriptor)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=SOURCE,
        description="Bring offline runs to W&B while they are written, each row once. Ends with Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "dir", metavar="DIR", nargs="+", type=Path, help="output_dir of a training, or a folder of such."
    )
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--until-finished", action="store_true", help="End when all runs are finished and in W&B.")
    ends.add_argument("--once", action="store_true", help="Bring what is there now, and end.")
    parser.add_argument("--interval", type=float, default=30.0, help="Seconds between two looks. Default: 30.")
    return parser


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def _say_error(code: int, message: str) -> int:
    print(f"harness.sync: {message}", file=sys.stderr, flush=True)
    return code
