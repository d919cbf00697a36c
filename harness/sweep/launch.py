"""The training of a trial, as a process of its own: started, ended, and what its end means."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.checkpoint.lock import Heartbeats, Lock, holder_of, is_held
from harness.checkpoint.processes import fingerprint_of, is_running
from harness.errors import HarnessError
from harness.files import write_whole
from harness.signals import INTERRUPTED_EXIT_CODE, PREEMPTED_EXIT_CODE, PREEMPTED_FILE, Noted, end_process
from harness.sweep.tied import words_tied

OUTPUT_FILE, ATTEMPTS_FILE = "output.log", "attempts.json"
COMPLETE_FILE = "all_results.json"  # what a training writes last
SECONDS_TO_SAVE = 120.0  # for a training whose worker has died
SECONDS_BETWEEN_LOOKS = 0.1
MOST_DEATHS = 3  # in a row since the same checkpoint
BYTES_OF_OUTPUT = 20_000  # at its end, in which the reason stands
WHOLE = re.compile(r"checkpoint-\d+")
# What torch's launcher says of a rank that a signal has killed.
KILLED_RANK = re.compile(r"exitcode\s*:\s*-(\d+)")
NOISE = re.compile(r"^\s*$|^(wandb|W&B|folder)\b|^(Traceback|During handling|The above exception)|^\s*[-=~^]+\s*$")

COMPLETE, STOPPED, PREEMPTED, KILLED, FAILED, IN_USE = "complete", "stopped", "preempted", "killed", "failed", "in use"


@dataclass(frozen=True, kw_only=True)
class Place:
    """The folders of a trial: `run` is the training's, `work` has its output, its attempts and its lease."""

    run: Path
    work: Path

    @property
    def output(self) -> Path:
        """What the trainings of the trial have printed."""
        return self.work / OUTPUT_FILE

    def attempts(self) -> list[dict[str, Any]]:
        """Return the attempts at the trial, the oldest first: the process, and how it ended, if that is known."""
        try:
            found = json.loads((self.work / ATTEMPTS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []

    def write_attempts(self, attempts: Sequence[Mapping[str, Any]]) -> None:
        """Replace the list of attempts. Raises OSError."""
        write_whole(self.work / ATTEMPTS_FILE, json.dumps(list(attempts), indent=1) + "\n")

    def last_checkpoint(self) -> str:
        """Return the name of the newest checkpoint, "" for none."""
        names = [path.name for path in self.run.glob("checkpoint-*") if WHOLE.fullmatch(path.name)]
        return max(names, key=lambda name: int(name.rpartition("-")[2]), default="")

    def deaths(self) -> int:
        """Return how many of the last attempts in a row were killed without a checkpoint since."""
        now, count = self.last_checkpoint(), 0
        for attempt in reversed(self.attempts()):
            if attempt.get("how") != KILLED or attempt.get("left") != now:
                break
            count += 1
        return count


@dataclass(frozen=True, kw_only=True)
class End:
    """How an attempt has ended, and why, in words for a person; `code` is the exit code, negative for a signal."""

    how: str
    code: int
    reason: str = ""


class Training:
    """A training that runs for a trial, in a process group of its own; it ends when this process dies."""

    def __init__(self, words: Sequence[str], place: Place, *, variables: Mapping[str, str] | None = None) -> None:
        place.work.mkdir(parents=True, exist_ok=True)
        (place.run / PREEMPTED_FILE).unlink(missing_ok=True)
        self.place, self._asked = place, False
        with place.output.open("ab") as output:
            begins_at = output.tell()
            self._process = subprocess.Popen(  # noqa: S603 - the command of the sweep
                words_tied(words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=None if variables is None else dict(variables),
            )
        pid = self._process.pid
        facts: dict[str, Any] = {"pid": pid, "fingerprint": fingerprint_of(pid), "began_at": time.time(), "how": None}
        facts["output_at"] = begins_at
        place.write_attempts([*place.attempts(), facts])

    def ended(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask it to save and end; a second call changes nothing."""
        if not self._asked:
            end_process(self._process.pid)
        self._asked = True

    def kill(self) -> None:
        """End it at once, all its ranks."""
        end_process(self._process.pid, at_once=True)
        self._process.wait()

    def followed(
        self,
        lease: Lock,
        noted: Noted,
        *,
        is_stopping: Callable[[], bool],
        look: Callable[[], None] = lambda: None,
    ) -> End | None:
        """
        Wait for its end and return it, with a look at it now and then; None if another worker has taken the trial over.

        A stop is passed on, once; a second Ctrl-C ends it at once.
        """
        try:
            while True:
                code = self.ended()
                look()
                if code is not None:
                    return self.outcome()
                if lease.is_lost():
                    self.kill()
                    return None
                if is_stopping():
                    self.stop()
                if noted.is_at_once:
                    self.kill()
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except BaseException:
            self.stop()
            raise

    def outcome(self) -> End:
        """Return what the end means, and record it. For a training that has ended."""
        code = self._process.wait()
        end_orphan(self.place)  # a rank whose launcher has left it behind may still save
        end = what_ended(code, self.place)
        attempts = self.place.attempts()
        if attempts:
            attempts[-1] |= {"how": end.how, "code": end.code, "left": self.place.last_checkpoint()}
            self.place.write_attempts(attempts)
        return end


def what_ended(code: int, place: Place) -> End:
    """Return what an exit code means, beside what the training has left in its folder and has printed."""
    tail = _tail(place)
    if code == 0:
        if (place.run / COMPLETE_FILE).exists():
            return End(how=COMPLETE, code=code)
        return End(how=STOPPED, code=code, reason=_last_line(tail))
    if code in (PREEMPTED_EXIT_CODE, INTERRUPTED_EXIT_CODE) or (place.run / PREEMPTED_FILE).exists():
        return End(how=PREEMPTED, code=code, reason=_last_line(tail))
    rank = KILLED_RANK.search(tail)
    if code < 0 or (code == 1 and rank is not None):
        number = -code if code < 0 else int(rank[1]) if rank is not None else 0
        return End(how=KILLED, code=code, reason=f"killed by signal {number}")
    if code == 2 and is_held(place.run, Heartbeats()):
        return End(how=IN_USE, code=code, reason=_last_line(tail))
    return End(how=FAILED, code=code, reason=f"exit code {code}: {_last_line(tail)}")


def end_orphan(place: Place) -> None:
    """
    End a training of the trial whose worker has died, after a save. For who has the trial's lease.

    Raises HarnessError if it does not end.
    """
    last = [each for each in place.attempts()[-1:] if each.get("how") is None]
    known = [(int(each.get("pid", 0)), each.get("fingerprint", "")) for each in last]
    if (holder := holder_of(place.run)) is not None:  # a rank whose launcher has died
        known.append((holder.pid, holder.created_at))
    running = [(pid, mark) for pid, mark in known if pid > 0 and pid != os.getpid() and is_running(pid, mark)]
    for at_once in (False, True):
        for pid, _ in running:
            end_process(pid, at_once=at_once)
        until = time.monotonic() + SECONDS_TO_SAVE
        while running and time.monotonic() < until:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            running = [(pid, mark) for pid, mark in running if is_running(pid, mark)]
    if running:
        raise HarnessError(f"Process {running[0][0]} trains in {place.run} and can't be ended: end it by hand.")


def _tail(place: Place) -> str:
    """Return the end of what the last attempt has printed."""
    begins_at = int((place.attempts() or [{}])[-1].get("output_at", 0))
    try:
        with place.output.open("rb") as file:
            file.seek(max(begins_at, place.output.stat().st_size - BYTES_OF_OUTPUT))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _last_line(text: str) -> str:
    """Return the line in which a training says why it has ended; a launcher's frames and W&B's words stand below it."""
    lines = [line.strip() for line in text.splitlines() if not NOISE.search(line)]
    own = [line for line in lines if line.startswith("harness train: ")]
    return (own or lines or ["it has printed nothing"])[-1].removeprefix("harness train: ")[:500]
