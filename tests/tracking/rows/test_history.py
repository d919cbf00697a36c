"""Each row once: over attempts that end anywhere, with rows lost on the way, and a journal that lost its end."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.tracking.rows.beyond import Source
from harness.tracking.rows.history import History
from harness.tracking.rows.journal import Journal


class Server:
    """What W&B has of a run."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []


class Run:
    """The client of one attempt: it takes rows at once, and `lose` forgets the newest of them."""

    def __init__(self, server: Server, *, offline: bool = False) -> None:
        self.server, self.summary, self.first = server, {}, len(server.rows)
        self._local_step = 0 if offline else self.first

    def log(self, row: Mapping[str, Any]) -> None:
        self.server.rows.append({name: value for name, value in row.items() if name != "_timestamp"})
        self._local_step += 1

    def lose(self, count: int) -> None:
        del self.server.rows[max(len(self.server.rows) - count, self.first) :]


def row(number: int) -> dict[str, Any]:
    """Two rows a step, as with an evaluation at each."""
    step, is_evaluation = number // 2 + 1, number % 2
    return {"eval/loss" if is_evaluation else "train/loss": 1 / (number + 1), "train/global_step": step}


def opened(path: Path, run: Run | None, *, rows: int = 0, first_row: int = 0, first_step: int = 0) -> History:
    have = None if run is None else run.first
    history = History(Journal(path), rows=rows, first_row=first_row, first_step=first_step, have=have)
    if run is not None:
        history.begin(run, offset=run.first - run._local_step)
    return history


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
@pytest.mark.parametrize("seed", range(12))
def test_attempts_that_end_anywhere_make_one_history(seed: int, offline: bool, tmp_path: Path) -> None:
    drawn, server, path = random.Random(seed), Server(), tmp_path / "metrics.jsonl"
    total, saved, synced = 60, 0, 0
    for attempt in range(12):
        run = (
            None if 0 < attempt < 11 and drawn.random() < 0.15 else Run(server, offline=offline)
        )  # None: W&B is out of reach
        history = opened(path, run, rows=saved)
        end = total if attempt == 11 else drawn.randint(saved, min(saved + 12, total))
        for number in range(saved, end):
            history.log(row(number))
            if drawn.random() < 0.2:
                history.sync()
                saved, synced = history.rows, path.stat().st_size
        assert history.rows == end
        if attempt < 11 and run is not None:
            run.lose(drawn.randint(0, 8))
        if attempt < 11 and drawn.random() < 0.3:  # the power went
            size = path.stat().st_size
            with path.open("r+b") as file:
                file.truncate(drawn.randint(min(synced, size), size))
    opened(path, Run(server, offline=offline), rows=saved)
    expected = [row(number) for number in range(total)]
    assert server.rows[: len(expected)] == expected
    assert len(server.rows) == total
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["_row"], line["_step"]) for line in lines] == [(number, number) for number in range(len(lines))]


def test_without_the_row_count_rows_would_come_twice(tmp_path: Path) -> None:
    server = Server()
    first = opened(tmp_path / "metrics.jsonl", Run(server))
    for number in range(4):
        first.log(row(number))
    (tmp_path / "metrics.jsonl").unlink()
    again = opened(tmp_path / "metrics.jsonl", Run(server), rows=2)
    for number in range(2, 6):
        again.log(row(number))
    assert server.rows == [row(number) for number in range(6)], "another machine: W&B's own count decides"


def test_other_values_are_told_once_with_step_and_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server, path = Server(), tmp_path / "metrics.jsonl"
    first = opened(path, Run(server))
    for number in range(6):
        first.log({**row(number), "train/nan": float("nan"), "eval/runtime": number})
    again = opened(path, Run(server), rows=2)
    with caplog.at_level(logging.WARNING):
        for number in range(2, 6):
            other = {"train/loss": 0.5} if number == 4 else {}
            again.log({**row(number), "train/nan": float("nan"), "eval/runtime": 7.0, **other})
    (said,) = [record.getMessage() for record in caplog.records]
    assert "at step 3 train/loss was 0.2 before the interruption and is now 0.5" in said
    assert "a relative difference of 6.0e-01" in said
    assert len(server.rows) == 6


def test_what_another_machine_measures_makes_no_other_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server, path = Server(), tmp_path / "metrics.jsonl"
    first = opened(path, Run(server))
    for number in range(6):
        first.log({**row(number), "train/throughput/data_wait_share": 0.1, "train/throughput/mfu": 0.4})
    again = opened(path, Run(server), rows=2)
    with caplog.at_level(logging.WARNING):
        for number in range(2, 7):  # no mfu on this one, and memory of its own
            again.log({**row(number), "train/throughput/data_wait_share": 0.2, "train/memory/peak_gib": 1.0})
    assert caplog.records == []
    assert [each.get("train/throughput/mfu") for each in server.rows] == [0.4] * 6 + [None]
    assert again.rows == len(server.rows) == 7


def test_a_run_that_makes_other_rows_keeps_those_that_are_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, path = Server(), tmp_path / "metrics.jsonl"
    first = opened(path, Run(server))
    for number in range(6):
        first.log(row(number))
    with caplog.at_level(logging.WARNING):
        longer = opened(path, Run(server), rows=5)
        longer.log({"train/loss": 0.0, "train/global_step": 9})
    assert "makes other rows than before the interruption, from step 3 on: the 1 that W&B has stay" in caplog.text
    assert server.rows == [*(row(number) for number in range(6)), {"train/loss": 0.0, "train/global_step": 9}]
    assert longer.rows == 7


def test_a_run_that_begins_at_a_checkpoint_has_no_row_of_before(tmp_path: Path) -> None:
    path, server = tmp_path / "metrics.jsonl", Server()
    before = opened(path, Run(Server()))
    for number in range(5):
        before.log(row(number))
    fork = opened(path, Run(server), rows=3, first_row=3)
    fork.log(row(3))
    assert server.rows == [row(3)]
    again = opened(path, Run(server), rows=4, first_row=3)
    again.log(row(4))
    assert server.rows == [row(3), row(4)]


def test_rows_that_nobody_has_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.rows = [row(number) for number in range(2)]
    with caplog.at_level(logging.WARNING):
        history = opened(tmp_path / "metrics.jsonl", Run(server), rows=5)
        history.log(row(5))
    assert "3 rows before the checkpoint are in neither W&B nor" in caplog.text
    assert server.rows[-1] == row(5)


def test_the_summary_of_a_new_attempt_has_the_latest_of_all(tmp_path: Path) -> None:
    server, path = Server(), tmp_path / "metrics.jsonl"
    first = opened(path, Run(server))
    for number in range(4):
        first.log(row(number))
    run = Run(server)
    opened(path, run, rows=4)
    assert run.summary == {"train/loss": 1 / 3, "eval/loss": 1 / 4, "train/global_step": 2}


def end(step: int) -> dict[str, Any]:
    """The row that a training makes at its end."""
    return {"train/epoch": step / 10, "train/global_step": step}


def step_row(step: int) -> dict[str, Any]:
    return {"train/loss": 1 / step, "train/epoch": step / 10, "train/global_step": step}


def shared(path: Path, server: Server, *, rows: int, first_row: int = 0) -> tuple[History, Run]:
    """A resume that may ask W&B what it has, as an online one does."""

    def read(first: int, stop: int) -> Iterator[dict[str, Any]]:
        yield from ({**row, "_step": step} for step, row in enumerate(server.rows[:stop]) if step >= first)

    run = Run(server)
    source = Source(read=read, is_shared=True)
    history = History(Journal(path), rows=rows, first_row=first_row, first_step=0, have=len(server.rows), source=source)
    history.begin(run, offset=0)
    return history, run


def train(history: History, first: int, last: int, *more: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [*(step_row(step) for step in range(first, last + 1)), end(last), *more]
    for each in rows:
        history.log(each)
    return rows


@pytest.mark.parametrize("evaluates", [False, True], ids=["", "evaluates at the end"])
@pytest.mark.parametrize("journal", ["whole", "of the checkpoint", "of an earlier version", "none"])
def test_a_training_that_has_ended_goes_on_with_all_its_rows(
    journal: str, evaluates: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, server = tmp_path / "metrics.jsonl", Server()
    more = [{"eval/loss": 0.5, "train/epoch": 1.0, "train/global_step": 10}] if evaluates else []
    before = train(shared(path, server, rows=0)[0], 1, 10, *more)
    assert server.rows == before
    if journal != "whole":
        lines = path.read_text().splitlines(keepends=True)[:10]
        path.write_text("" if journal == "none" else "".join(lines))
    with caplog.at_level(logging.WARNING):
        history, _ = shared(path, server, rows=10)
        after = train(history, 11, 14)
        again = train(shared(path, server, rows=history.rows - 3)[0], 13, 14)
    assert again == after[2:]
    assert server.rows == before + after
    assert history.rows == len(server.rows)
    assert caplog.records == []


def test_a_training_that_ends_again_sends_nothing_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    before = train(shared(tmp_path / "a.jsonl", server, rows=0)[0], 1, 10)
    with caplog.at_level(logging.WARNING):
        train(shared(tmp_path / "b.jsonl", server, rows=5)[0], 6, 10)
        train(shared(tmp_path / "c.jsonl", server, rows=10)[0], 11, 10)
    assert server.rows == before
    assert caplog.records == []


def test_rows_that_were_made_without_wandb_go_behind_the_end_of_the_training_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, path = Server(), tmp_path / "b.jsonl"
    before = train(shared(tmp_path / "a.jsonl", server, rows=0)[0], 1, 10)
    path.write_text("".join((tmp_path / "a.jsonl").read_text().splitlines(keepends=True)[:10]))
    unreached = opened(path, None, rows=10)
    for step in range(11, 15):
        unreached.log(step_row(step))
    with caplog.at_level(logging.WARNING):
        history, _ = shared(path, server, rows=13)  # the checkpoint of step 13
        after = train(history, 14, 16)
    assert server.rows == [*before, *(step_row(step) for step in range(11, 14)), *after]
    assert caplog.records == []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["_row"] for line in lines] == list(range(len(lines)))
    assert [server.rows[line["_step"]] for line in lines] == [
        {name: value for name, value in line.items() if not name.startswith("_")} for line in lines
    ]


def test_rows_of_another_folder_are_compared_and_not_taken_for_ours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, ours, theirs, later = Server(), *(tmp_path / f"{name}.jsonl" for name in "abc")
    for step in range(1, 6):
        shared(ours, server, rows=step - 1)[0].log(step_row(step))
    theirs.write_bytes(ours.read_bytes())
    later.write_bytes(ours.read_bytes())
    elsewhere, _ = shared(theirs, server, rows=5)
    for step in range(6, 9):
        elsewhere.log({**step_row(step), "train/loss": 9.0})
    with caplog.at_level(logging.WARNING):
        history, _ = shared(ours, server, rows=5)
        history.log(step_row(6))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "at step 6 train/loss was 9.0 before the interruption and is now 0.1666" in said
    caplog.clear()
    unreached = opened(later, None, rows=5)
    for step in range(6, 8):
        unreached.log(step_row(step))
    with caplog.at_level(logging.WARNING):
        shared(later, server, rows=7)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "W&B has another row 5 than this training" in said


def test_rows_that_cannot_be_read_back_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    for step in range(1, 9):
        shared(tmp_path / "a.jsonl", server, rows=step - 1)[0].log(step_row(step))

    def read(first: int, stop: int) -> Iterator[dict[str, Any]]:
        raise TimeoutError("no answer")

    source = Source(read=read, is_shared=True)
    with caplog.at_level(logging.WARNING):
        History(Journal(tmp_path / "b.jsonl"), rows=5, first_row=0, first_step=0, have=8, source=source)
    assert "3 rows that W&B has beyond the checkpoint can't be read (TimeoutError: no answer)" in caplog.text


def test_rows_of_the_users_own_in_wandb_are_no_rows_of_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, path = Server(), tmp_path / "a.jsonl"
    history, run = shared(path, server, rows=0)
    for step in range(1, 9):
        history.log(step_row(step))
        run.log({"own": step, "train/global_step": step})
    with caplog.at_level(logging.WARNING):
        history, _ = shared(tmp_path / "b.jsonl", server, rows=5)
        train(history, 6, 10)
    assert caplog.records == []
    losses = [row["train/global_step"] for row in server.rows if "train/loss" in row]
    assert losses == list(range(1, 11))


@pytest.mark.parametrize("lines", [3, 5, 10], ids=["none of its own", "some", "all"])
def test_a_fork_that_has_ended_goes_on_with_its_own_rows(
    lines: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    origin, path = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    train(shared(origin, Server(), rows=0)[0], 1, 10)
    path.write_text("".join(origin.read_text().splitlines(keepends=True)[:3]))
    server = Server()
    before = train(shared(path, server, rows=3, first_row=3)[0], 4, 10)
    assert server.rows == before
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    with caplog.at_level(logging.WARNING):
        history, _ = shared(path, server, rows=10, first_row=3)
        after = train(history, 11, 14)
    assert server.rows == before + after
    assert caplog.records == []
