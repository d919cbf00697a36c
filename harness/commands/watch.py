"""Upload the runs in some folders to W&B, round by round: the work of `harness sync`."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.checkpoint.lock import WATCH_SECONDS, Heartbeats, is_held
from harness.checkpoint.processes import is_running
from harness.errors import BusyError, ConfigError, DeliveryError, RowsError, SyncError, UnreachableError
from harness.masking import masked
from harness.signals import PREEMPTED_EXIT_CODE, PREEMPTED_FILE
from harness.tracking.artifacts.staging import RECORD_FILE, STAGING_FOLDER
from harness.tracking.client import one_line, open_api, server_answers
from harness.tracking.rows.wandb_file import read_log
from harness.tracking.run import identity as identities
from harness.tracking.run.identity import IDENTITY_FILE, RUN_FOLDER, Identity, home_of
from harness.tracking.sync import OfflineRun, OnlineRuns, Outcome, Reading

LOCK = "wandb_sync.lock"
# Files that mark a folder with runs, and how deep it may be: the given folder, runs/NAME, sweeps/runs/NAME.
WANDB_MARKS = ("wandb/run-*/run-*.wandb", "wandb/offline-run-*/run-*.wandb")
MARKS = (IDENTITY_FILE, f"{STAGING_FOLDER}/*/{RECORD_FILE}", *WANDB_MARKS)
DEPTHS = ("", "*/", "*/*/")
LONGEST_PAUSE_SECONDS = 600.0
QUIET_SECONDS = 120.0
GOING, FINISHED, PREEMPTED, INTERRUPTED = "running", "finished", "preempted", "interrupted"

Run = OfflineRun | OnlineRuns
Key = tuple[Path, str]


class Watch:
    """The runs in some folders; each round looks for new ones."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._api: Any = None
        self._heartbeats = Heartbeats()
        self._said: dict[Key, str] = {}
        self._whole: dict[Key, object] = {}  # the state of a run's files when all of them had been uploaded
        self._readings: dict[Key, Reading] = {}

    def check(self, *, needs_runs: bool) -> None:
        """Raise ConfigError if there is nothing to do."""
        if needs_runs and not any(True for _ in find_runs(self._folders)):
            names = ", ".join(map(str, self._folders))
            raise ConfigError(
                f"{names}: no run with W&B is here or in a folder below; give --until-finished to wait for one."
            )

    def follow(self, *, interval: float, once: bool, until_finished: bool) -> int:
        """
        Repeat rounds while a run is running; one round with `once`, until all have finished with `until_finished`.

        Returns the exit code. Raises UnreachableError if W&B becomes unreachable and it does not wait, ConfigError if
        W&B was not reachable from the start.
        """
        failures = 0
        while True:
            states_now = [state_of(run, self._heartbeats) for run in find_runs(self._folders)]
            waits = until_finished or (not once and GOING in states_now)
            if once and self._heartbeats.num_watched:
                _say(f"Watching the heartbeats of runs on other machines or in containers for {WATCH_SECONDS:g} s.")
                time.sleep(WATCH_SECONDS)
            try:
                states = self.round()
            except UnreachableError as error:
                if self._api is None and (not waits or "credentials" in str(error)):
                    raise ConfigError(f"{error} Nothing was sent.") from error
                if not waits:
                    raise
                _say(f"{error} It is tried again.")
                failures += 1
            else:
                failures = 0
                is_whole = all(key in self._whole for key in states)
                if until_finished and is_whole and {*states.values()} == {FINISHED}:
                    _say(f"All {len(states)} runs are finished, and W&B has all of them.")
                    return 0
                if not waits:
                    return 0 if is_whole else 1
            time.sleep(min(interval * 2**failures, max(interval, LONGEST_PAUSE_SECONDS)))

    def round(self) -> dict[Key, str]:
        """Upload what is new of each run; returns the state of each. Raises UnreachableError."""
        if self._api is None:
            self._api = open_api("harness sync", silent=True)
        states = {}
        for run in find_runs(self._folders):
            key = _key(run)
            states[key] = state = state_of(run, self._heartbeats)
            before = _signature(run, state)
            if self._whole.get(key) == before:
                continue
            self._whole.pop(key, None)
            if isinstance(run, OfflineRun):
                run.reading = self._readings.setdefault(key, run.reading)
            if isinstance(run, OnlineRuns) and state == GOING:
                self._tell(run, "running online: it sends its rows itself")
                self._whole[key] = before
            elif (outcome := self._deliver(run, state)) is not None:
                self._tell(run, _described(outcome, state, run.identity.exit_code if run.identity else None))
                if outcome.is_whole:
                    self._whole[key] = before
                    if state == FINISHED:
                        self._readings.pop(key, None)
        if not states and not self._said:
            _say(f"{self._folders[0]}: no run yet; waiting")
            self._said[self._folders[0], ""] = ""
        return states

    def _deliver(self, run: Run, state: str) -> Outcome | None:
        """Return what was uploaded; None if that failed, which is logged. Raises UnreachableError."""
        try:
            with _alone(run.output_dir) as lock:
                if isinstance(run, OnlineRuns):
                    return run.deliver(self._api)
                return run.deliver(self._api, is_over=state != GOING, is_finished=state == FINISHED, lock=lock)
        except BusyError:
            self._tell(run, "another harness sync is at work here")
        except UnreachableError:
            raise
        except Exception as error:  # wandb and its transports raise many types; the other runs are still uploaded
            base_url = self._api.settings["base_url"]
            if not server_answers(base_url):
                raise UnreachableError(f"W&B can't be reached at {base_url}.") from error
            is_own = isinstance(error, RowsError | SyncError | DeliveryError)
            self._tell(run, f"not brought: {error if is_own else one_line(error)}")
        return None

    def _tell(self, run: Run, what: str) -> None:
        key = _key(run)
        if self._said.get(key) != what:
            _say(f"{run.output_dir}: {what}")
        self._said[key] = what


def find_runs(folders: Iterable[Path]) -> Iterator[Run]:
    """
    Yield the runs in these folders and below, each once.

    Each is read at its turn, since earlier ones may take long.
    """
    seen: set[Key] = set()
    for folder in folders:
        for home in _homes(folder):
            for run in _runs_of(home):
                if (key := _key(run)) not in seen:
                    seen.add(key)
                    yield run


def _homes(folder: Path) -> list[Path]:
    """Return the folders that hold runs; for one of W&B's own folders, the folder of its training."""
    home = home_of(folder)
    if (home / IDENTITY_FILE).is_file() and home != folder.absolute():
        return [home]
    if RUN_FOLDER.fullmatch(folder.name) and any(folder.glob("run-*.wandb")):
        return [folder.absolute()]
    root, depths = (folder.parent, DEPTHS[:1]) if folder.name == "wandb" else (folder, DEPTHS)
    found = (path.parents[mark.count("/")] for depth in depths for mark in MARKS for path in root.glob(depth + mark))
    return sorted({path.absolute() for path in found})


def _runs_of(home: Path) -> Iterator[Run]:
    identity = identities.read(home)
    if identity is not None and identity.mode != "online":
        yield OfflineRun(home, identity)
    elif identity is None:  # of a training loop of the user's own, which has no identity file
        yield from _unnamed(home)
    online = OnlineRuns(home, identity)
    if online.files() or (identity is not None and identity.mode == "online"):
        yield online


def _unnamed(home: Path) -> Iterator[Run]:
    """Yield offline runs found by the names of W&B's folders; `home` may be such a folder."""
    if home.name.startswith("offline-run-"):
        paths, places = home.glob("run-*.wandb"), [str(home)]
        home = home.parent.parent if home.parent.name == "wandb" else home.parent
    else:
        paths, places = home.glob(WANDB_MARKS[1]), []
    for run_id in dict.fromkeys(path.stem.removeprefix("run-") for path in paths):
        yield OfflineRun(home, Identity(run_id=run_id, mode="offline", offline_folders=dict.fromkeys(places)))


def state_of(run: Run, heartbeats: Heartbeats) -> str:
    """Return a run's state: of a training by its lock, marker and last attempt's end, of others by their files."""
    identity = identities.read(run.output_dir)
    if identity is None or isinstance(run, OnlineRuns) != (identity.mode == "online"):
        return GOING if any(_is_open(path) for path in _written_lately(run)) else FINISHED
    held = is_held(run.output_dir, heartbeats)
    if held is None and identity.exit_code is None:  # a training loop of the user's own has no lock
        processes = identity.processes
        if processes and processes["host"] == platform.node():
            held = is_running(*processes["owner"])
        if held is None:
            held = bool(_written_lately(run))
    if held:
        return GOING
    # A job's script deletes the marker before its next attempt opens the run.
    if identity.exit_code == PREEMPTED_EXIT_CODE or (run.output_dir / PREEMPTED_FILE).exists():
        return PREEMPTED
    return INTERRUPTED if identity.exit_code is None else FINISHED


def _written_lately(run: Run) -> list[Path]:
    """Return the files that wandb's process has written to lately; it writes every few seconds."""
    files = [path for path in run.files() if path.suffix == ".wandb"]
    return [path for path in files if time.time() - path.stat().st_mtime < QUIET_SECONDS]


def _is_open(path: Path) -> bool:
    """Whether a .wandb file has no record of the end of its run."""
    try:
        log = read_log(path)
    except (OSError, ValueError):
        return False
    return log is None or log.exit_code is None


def _key(run: Run) -> Key:
    return run.output_dir, run.identity.run_id if isinstance(run, OfflineRun) else ""


def _signature(run: Run, state: str) -> object:
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
        parts.append("waits for its next attempt")
    return ", ".join([*parts, *outcome.problems])


@contextmanager
def _alone(output_dir: Path) -> Iterator[int | None]:
    """Hold a lock until this process and the `wandb sync` that it starts have ended. Raises BusyError, OSError."""
    descriptor = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError from error
        except OSError:  # the file system has no locks
            yield None
            return
        yield descriptor
    finally:
        os.close(descriptor)


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {masked(what)}", flush=True)
