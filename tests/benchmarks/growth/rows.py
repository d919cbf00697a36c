"""
What a logged row costs, beside `Run.log` and the Trainer's callback, and how that grows with the rows of a run.

Growth is of what is ours: a row in the journal, a resume from so many rows (with W&B, which has them all, and without),
the rows' copy in a checkpoint, and the history in trainer_state.json, written and read.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.contest import OURS, Curve, Result, alternate
from tests.support.wandb_server import API_KEY, WandbServer

ROW = {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 3e-4, "epoch": 0.5, **{f"own_{i}": float(i) for i in range(6)}}
ROWS_A_TURN, PAUSE_SECONDS = 40, 0.005  # a training has steps between its rows
SIZES = (10_000, 1_000_000)
LINEAR, CONSTANT = 1.1, 0.15  # with what a quiet machine adds


def measure(device: str, repeats: int) -> list[Result | Curve]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        logged = [logged_rows(folder, mode, repeats) for mode in ("offline", "online")]
        return [*logged, *grown(folder, repeats)]


def logged_rows(folder: Path, mode: str, repeats: int) -> Result:
    """The milliseconds of a row in a run of W&B's, adopted by all three."""
    with opened_run(folder / mode, mode) as run:
        ways = ways_to_log(run, folder / mode)
        figures = alternate(ways, repeats=repeats, warmup=1)
    setting = f"{len(ROW)} values; the middle of {ROWS_A_TURN} rows"
    return Result(what=f"a logged row, {mode}", unit="ms", figures=figures, base="Run.log", setting=setting)


@contextmanager
def opened_run(folder: Path, mode: str) -> Iterator[Any]:
    """A run that the folder keeps, or that goes to a server on this machine."""
    import wandb

    folder.mkdir()
    with WandbServer(folder / "server") as server:
        given = {"base_url": server.url, "api_key": API_KEY} if mode == "online" else {}
        settings = wandb.Settings(x_disable_stats=True, silent=True, **given)
        run = wandb.init(project="rows", dir=folder, mode=mode, settings=settings)
        yield run
        run.finish()
        wandb.teardown()


def ways_to_log(run: Any, folder: Path) -> dict[str, Callable[[], float]]:
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from transformers.integrations import WandbCallback

    from harness.tracking import TrackingConfig, WandbTracker

    tracker = WandbTracker(TrackingConfig())
    tracker.start()  # adopts the run
    callback, control = WandbCallback(), TrainerControl()
    callback._initialized = True
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    state = TrainerState(is_world_process_zero=True)

    def by_hand(row: dict[str, Any]) -> None:
        run.log({**{f"train/{name}": value for name, value in row.items()}, "train/global_step": state.global_step})

    def by_trainer(row: dict[str, Any]) -> None:
        callback.on_log(arguments, state, control, model=None, logs=row)

    def by_us(row: dict[str, Any]) -> None:
        tracker.log(row, step=state.global_step)

    def middle(log: Callable[[dict[str, Any]], None]) -> float:
        times = []
        for _ in range(ROWS_A_TURN):
            state.global_step += 1
            began = time.perf_counter()
            log(dict(ROW))
            times.append(1000 * (time.perf_counter() - began))
            time.sleep(PAUSE_SECONDS)
        return statistics.median(times)

    found = {"Run.log": by_hand, "Trainer": by_trainer, OURS: by_us}
    return {name: lambda log=log: middle(log) for name, log in found.items()}  # type: ignore[misc]


def grown(folder: Path, repeats: int) -> list[Curve]:
    """The curves of all that reads or writes the rows of a whole training."""
    found: dict[str, dict[float, list[float]]] = {name: {} for name in STAGES}
    for size in SIZES:
        place = folder / str(size)
        place.mkdir()
        write_journal(place / "metrics.jsonl", size)
        for _ in range(repeats):
            for name, (stage, _) in STAGES.items():
                found[name].setdefault(size, []).append(stage(place, size))
        shutil.rmtree(place)
    return [
        Curve(what=name, unit=unit, size="rows", figures={OURS: found[name]}, most_growth=growth)
        for name, (_, (unit, growth)) in STAGES.items()
    ]


def row_of(number: int) -> dict[str, float]:
    """What a training logs at a step, in W&B's names."""
    values = {"loss": 1 / (number + 1), "grad_norm": 1.5, "learning_rate": 3e-4, "epoch": number / 1000}
    return {**{f"train/{name}": value for name, value in values.items()}, "train/global_step": number + 1}


def write_journal(path: Path, size: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(size):
            line = {"_row": number, "_step": number, "_timestamp": 1e9 + number, **row_of(number)}
            file.write(json.dumps(line) + "\n")


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def a_row(folder: Path, size: int) -> float:
    """Milliseconds of a row behind so many: the middle of a thousand."""
    from harness.tracking.rows.local import LocalRows

    rows = LocalRows(folder, resumes=True)
    rows.load_state_dict({"rows": size}, folder)
    rows.open()
    times = [timed(lambda number=number: rows.log(row_of(number))) for number in range(size, size + 1000)]  # type: ignore[misc]
    rows.close()
    return 1000 * statistics.median(times)


def a_resume(folder: Path, size: int) -> float:
    from harness.tracking.rows.local import LocalRows

    rows = LocalRows(folder, resumes=True)
    rows.load_state_dict({"rows": size}, folder)
    seconds = timed(rows.open)
    rows.close()
    return seconds


def a_resume_with_wandb(folder: Path, size: int) -> float:
    """What happens before and after `wandb.init`: the server has all rows, and gives the newest one back."""
    from harness.tracking.rows.beyond import Source
    from harness.tracking.rows.history import History
    from harness.tracking.rows.journal import Journal

    newest = {"_step": size - 1, "_timestamp": 1e9 + size - 1, **row_of(size - 1)}
    source = Source(read=lambda *_: iter([newest]), is_shared=True)
    found: list[History] = []

    def resume() -> None:
        journal = Journal(folder / "metrics.jsonl")
        found.append(History(journal, rows=size, first_row=0, first_step=0, have=size, source=source))

    seconds = timed(resume)
    found[0].close()
    return seconds


def a_copy(folder: Path, size: int) -> float:
    from harness.tracking.rows.journal import Journal

    journal = Journal(folder / "metrics.jsonl")
    journal.begin(journal.path.stat().st_size)
    seconds = timed(lambda: journal.copier()(folder / "copy.jsonl"))
    journal.close()
    return seconds


def a_history_written(folder: Path, size: int) -> float:
    from harness.files import write_json
    from harness.training.state import TRAINER_STATE_FILE, TrainState

    history = [{name.removeprefix("train/"): value for name, value in row_of(n).items()} for n in range(size)]
    for row in history:
        row["step"] = int(row.pop("global_step"))
    state = TrainState(global_step=size, max_steps=size, log_history=history)
    return timed(lambda: write_json(folder / TRAINER_STATE_FILE, state.trainer_state(early_stopping=None)))


def a_history_read(folder: Path, size: int) -> float:
    from harness.checkpoint.schema import check_counters, read_json
    from harness.training.state import TRAINER_STATE_FILE, TrainState

    path = folder / TRAINER_STATE_FILE

    def read() -> None:
        check_counters(path.name, read_json(path))
        TrainState().load_trainer_state(path)

    return timed(read)


# Each with its unit and the largest power that is allowed.
STAGES: dict[str, tuple[Callable[[Path, int], float], tuple[str, float]]] = {
    "a row in the journal": (a_row, ("ms", CONSTANT)),
    "a resume without W&B": (a_resume, ("s", LINEAR)),
    "a resume with W&B, without its requests": (a_resume_with_wandb, ("s", LINEAR)),
    "the rows' copy in a checkpoint, beside the training": (a_copy, ("s", LINEAR)),
    "the history in trainer_state.json, written beside the training": (a_history_written, ("s", LINEAR)),
    "the history in trainer_state.json, read": (a_history_read, ("s", LINEAR)),
}
