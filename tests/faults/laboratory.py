"""A case: one training, killed and restarted until it ends; then compared with the reference of its configuration."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import deaths, moments
from tests.faults.attempt import CONTAINER, Attempt, HungError, committed_steps, end_processes_of
from tests.faults.compare import Verdict, compare_rows, compare_runs, compare_word, without_first_end
from tests.faults.plan import RUN_NAME, SMALL_DISK, Case, Configuration, Kill
from tests.support.launching import DDP, SCRIPT, launcher
from tests.support.parity import as_flags
from tests.support.wandb.artifact_processes import environment
from tests.support.wandb_server import WandbServer

MOST_ATTEMPTS = 15
# While it trains, it listens.
LISTENS = ("step", "save", "commit", "evaluation", "upload")


@dataclass
class Result:
    """What came of a case; one line of results.jsonl."""

    name: str
    seed: int
    case: int
    configuration: str
    kills: list[dict[str, Any]] = field(default_factory=list)
    attempts: int = 0
    seconds: float = 0.0
    verdicts: dict[str, int] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)
    kept: str | None = None


class Laboratory:
    """Works in `folder`, with one W&B server for all that is online. A context manager."""

    def __init__(self, folder: Path, *, pins_run_id: bool) -> None:
        self.folder, self.pins_run_id = folder.resolve(), pins_run_id
        self.server = WandbServer(self.folder / "server")
        self._serves = False

    def __enter__(self) -> Laboratory:
        self.folder.mkdir(parents=True, exist_ok=True)
        deaths.sweep(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        deaths.sweep(self.folder)

    def reference(self, configuration: Configuration) -> tuple[Path, moments.Durations]:
        """The folder of an uninterrupted run, made once, and how long its parts took. Raises RuntimeError."""
        if configuration.tracking != "none" and not self._serves:
            self.server.start()
            self._serves = True
        place = self.folder / f"reference-{configuration.label}"
        measured = place / "durations.json"
        if not measured.is_file():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            alone = Case(seed=0, index=0, configuration=configuration, on_small_disk=False, kills=())
            attempt = self._start(alone, place, place / "run", number=1, end=configuration.ends[-1])
            code = attempt.end()
            if code != 0:
                raise RuntimeError(f"the reference in {place} ended with {code}:\n{attempt.text('err')[-3000:]}")
            if configuration.tracking == "offline":
                self.sync(place, project=place.name)
            measured.write_text(json.dumps(asdict(moments.measured(attempt))), encoding="utf-8")
        return place / "run", moments.Durations(**json.loads(measured.read_text(encoding="utf-8")))

    def run(self, case: Case) -> Result:
        """Play a case to its end; what it leaves is kept if anything is wrong. Nothing goes on running."""
        expected, durations = self.reference(case.configuration)
        place = self._new_place(case)
        result = Result(case.name, case.seed, case.index, case.configuration.label)
        verdict, began = Verdict(), time.monotonic()
        with contextlib.ExitStack() as stack:
            if case.on_small_disk:
                stack.enter_context(deaths.small_disk(place / "disk", SMALL_DISK))
            stack.callback(_free, place)
            output_dir = place / "disk" / "run"
            if self._live(case, place, output_dir, durations, result, verdict):
                self._compare(case, place, expected, output_dir, result, verdict)
            end_processes_of(place)
            if not verdict.is_good and case.on_small_disk and output_dir.is_dir():
                deaths.mend_folder(output_dir)
                shutil.copytree(output_dir, place / "run")
                result.kept = str(place / "run")
            elif not verdict.is_good:
                result.kept = str(output_dir)
        if verdict.is_good:
            shutil.rmtree(place)
        result.seconds = round(time.monotonic() - began, 1)
        result.verdicts, result.details = dict(verdict.counts), verdict.details
        return result

    def _new_place(self, case: Case) -> Path:
        """Make the folder of a case; the server may know its project from a sitting that was ended in the middle."""
        known = {run.project for run in self.server.runs()} if self._serves else set()
        name = f"case-{case.name}"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        place = self.folder / next(each for each in names if each not in known)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def _live(
        self,
        case: Case,
        place: Path,
        output_dir: Path,
        durations: moments.Durations,
        result: Result,
        verdict: Verdict,
    ) -> bool:
        """Run all attempts of a case; returns whether the last one got to the end."""
        kills, ends = list(case.kills), list(case.configuration.ends)
        for number in range(1, MOST_ATTEMPTS + 1):
            kill = kills[0] if kills else None
            attempt = self._start(case, place, output_dir, number=number, end=ends[0], kill=kill)
            result.attempts = number
            try:
                struck, code = self._one_attempt(case, attempt, kill, durations, result, verdict)
            except HungError as error:
                verdict.add("lost", str(error))
                return False
            kills = kills[1:] if struck else kills
            deaths.mend(attempt)  # after the last one too: what is compared needs room on the disk
            if code == 0:
                ends.pop(0)
                if not ends:
                    return True
            elif not struck:
                verdict.add("lost", f"attempt {number} ended by itself with {code}: {_last_words(attempt)}")
                return False
        verdict.add("lost", f"no end after {MOST_ATTEMPTS} attempts")
        return False

    def _one_attempt(
        self,
        case: Case,
        attempt: Attempt,
        kill: Kill | None,
        durations: moments.Durations,
        result: Result,
        verdict: Verdict,
    ) -> tuple[bool, int]:
        """Whether it was killed, and its exit code."""
        if kill is None:
            return False, attempt.end()
        requests = self.server.folder / "requests.jsonl" if case.configuration.uploads else None
        if not moments.wait_for(kill, attempt, durations, requests):
            return False, attempt.end()
        record = {"kind": kill.kind, "moment": kill.moment, "attempt": attempt.number, "step": attempt.step}
        record |= {
            "committed": committed_steps(attempt.output_dir),
            "after_seconds": round(time.time() - attempt.began_at, 3),
        }
        result.kills.append(record)
        record["done"] = deaths.strike(kill, attempt)
        code = attempt.end()
        record["code"] = code
        if kill.moment in LISTENS and case.configuration.who == "ours" and code != 0:
            self._check_heeded(case, attempt, record, verdict)
        return True, code

    def _check_heeded(self, case: Case, attempt: Attempt, record: dict[str, Any], verdict: Verdict) -> None:
        """What a death that asks for it has come to: a save, or no end at all."""
        kind, code, is_one = record["kind"], record["code"], case.configuration.processes == 1
        what = f"{record['done']} in attempt {attempt.number}: exit code {code}"
        if kind in ("term", "hangup"):
            marked = (attempt.output_dir / "preempted").is_file()
            if not marked or (is_one and code != 85):
                verdict.add("unheeded", f"{what}, marker: {marked}")
        elif kind == "interrupt":
            # A batch is drawn ahead of its step: the step that is made is the one before.
            is_saved = max(committed_steps(attempt.output_dir), default=0) >= record["step"] - 1
            if not is_saved or (is_one and code != 130):
                verdict.add("unheeded", f"{what}, saved: {is_saved}")
        elif kind in ("closed_stdout", "clock") and record["done"].endswith(deaths.LEFT_TO_ITSELF):
            verdict.add("unheeded", what)

    def _start(
        self, case: Case, place: Path, output_dir: Path, *, number: int, end: int, kill: Kill | None = None
    ) -> Attempt:
        configuration = case.configuration
        arguments = {**configuration.arguments, "output_dir": str(output_dir), "max_steps": end}
        if configuration.who == "ours":
            flags = as_flags({**arguments, **self._flags(configuration)})
            if case.is_renamed and not (output_dir / "wandb_run.json").is_file():
                flags.append(f"--run_name={RUN_NAME}")
            script = ["-m", "tests.faults.contained"] if case.in_containers else [SCRIPT]
            command = [*script, *flags, "--resume_from_checkpoint=auto"]
            command = [*command, "--use_cpu"] if configuration.processes == 1 else command
        else:
            arguments |= {"report_to": "none" if configuration.tracking == "none" else "wandb"}
            command = ["-m", "tests.faults.trainer_attempt", json.dumps(arguments)]
        started = launcher(DDP.with_stem(configuration.launch)) if configuration.processes == 2 else [sys.executable]
        started = [*CONTAINER, *started] if case.in_containers else started
        is_read = kill is not None and kill.kind == "closed_stdout"
        variables = self._variables(configuration, place)
        return Attempt.start([*started, *command], variables, place, output_dir, number, is_read=is_read)

    def _flags(self, configuration: Configuration) -> dict[str, Any]:
        flags: dict[str, Any] = {
            "task": "tests.faults.task:build",
            # The Trainer gets the easier one: with a collator that draws random numbers it is not exact.
            "task_args": {"random_collator": True, "stream": configuration.data == "stream"},
            "report_to": "none" if configuration.tracking == "none" else "wandb",
        }
        if configuration.tracking != "none":
            flags |= {"wandb_mode": configuration.tracking, "wandb_finish_timeout": 20}
            flags["wandb_log_model"] = "checkpoint" if configuration.uploads else "false"
        return flags

    def _variables(self, configuration: Configuration, place: Path) -> dict[str, str]:
        tracked = {"WANDB_PROJECT": place.name, "WANDB_SILENT": "true", "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.5"}
        if configuration.who == "trainer":
            tracked |= {"WANDB_MODE": configuration.tracking, "WANDB_DIR": str(place / "disk")}
            tracked |= {"WANDB_LOG_MODEL": "checkpoint" if configuration.uploads else "false"}
        if configuration.who == "trainer" or self.pins_run_id:
            tracked |= {"WANDB_RUN_ID": place.name[-64:], "WANDB_RESUME": "allow"}
        # Steps keep their time when several threads don't compete; sums are the same with one in both.
        variables = {"TORCH_EXTENSIONS_DIR": str(self.folder / "extensions")}  # DeepSpeed compiles one once
        variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        variables |= tracked if configuration.tracking != "none" else {}
        server = self.server if configuration.tracking == "online" else None
        found = environment(place, server, **variables)
        return {name: value for name, value in found.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def _compare(
        self, case: Case, place: Path, expected: Path, output_dir: Path, result: Result, verdict: Verdict
    ) -> None:
        compare_runs(expected, output_dir, processes=case.configuration.processes, verdict=verdict)
        if case.configuration.tracking == "none":
            return
        end_processes_of(place)  # nothing is delivered behind our back
        if case.configuration.tracking == "offline" and (fault := self.sync(place, project=place.name)) is not None:
            verdict.add("sync", fault)
        runs = [run for run in self.server.runs() if run.project == place.name]
        if len(runs) != 1:
            verdict.add("runs", f"{len(runs)} runs in W&B: {[run.id for run in runs]}")
        reference = [run for run in self.server.runs() if run.project == expected.parent.name]
        rows = [row for run in runs for row in run.rows]
        last = result.kills[-1] if result.kills else {}
        is_unread = last.get("kind") == "closed_stdout" and last["attempt"] == result.attempts
        if case.configuration.tracking == "online" and case.configuration.who == "ours" and not is_unread:
            said = (place / f"out-{result.attempts}").read_text(encoding="utf-8", errors="replace")
            compare_word(said, rows, verdict=verdict)
        if case.configuration.extends:
            rows = without_first_end(rows, verdict=verdict)
        compare_rows([row for run in reference for row in run.rows], rows, verdict=verdict)
        if case.is_renamed:
            collections = [each.collection for each in self.server.artifacts() if each.project == place.name]
            names = {each.split("-", 1)[1] for each in collections if each.startswith(("checkpoint-", "model-"))}
            names |= {run.name for run in runs}
            if names != {RUN_NAME}:
                verdict.add("renamed", f"{RUN_NAME} became {sorted(names)}")

    def sync(self, place: Path, *, project: str) -> str | None:
        """
        Run `wandb sync` on all offline run folders, in order of start; returns why it failed, or None.

        wandb gives up at the first folder that it can't read: then the folders are synced one by one.
        """
        folders = sorted((path for path in place.rglob("offline-run-*") if path.is_dir()), key=_order)
        if not folders:
            return "nothing was written offline"
        said = self._sync(place, project, folders)
        if "ERROR" not in said:
            return None
        for folder in folders:
            self._sync(place, project, [folder])
        return next(line for line in said.splitlines() if "ERROR" in line)

    def _sync(self, place: Path, project: str, folders: list[Path]) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "--project", project, *map(str, folders)],
            env={**environment(place, self.server), "WANDB_SILENT": "false"},
            cwd=place,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        with (place / "sync").open("a", encoding="utf-8") as file:
            file.write(ended.stdout + ended.stderr)
        return ended.stdout + ended.stderr


def _order(folder: Path) -> tuple[str, float]:
    # Their names hold the second of the start; of two in a second the file's age decides.
    return folder.name.split("-")[2], folder.stat().st_mtime


def _last_words(attempt: Attempt) -> str:
    lines = [line for line in attempt.text("err").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("harness train: ")]
    return (said or lines or [""])[-1][:600]


def _free(place: Path) -> None:
    end_processes_of(place)
    for output_dir in (place / "disk" / "run", place / "run"):
        deaths.mend_folder(output_dir)


def append(path: Path, result: Result) -> None:
    """A line of results.jsonl, durable."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def results_in(path: Path) -> list[Result]:
    """What earlier sittings found; a line that was cut is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(Result(**json.loads(line)))
    return found
