"""Rows that an online run could not deliver, with wandb's own files and client and a server that dies."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.errors import RowsError
from harness.tracking import client
from harness.tracking.rows import server as rows_module
from harness.tracking.rows.server import AtServer, Connection, deliver_rows, missing, online_logs, rows_arrived
from harness.tracking.rows.wandb_file import TransactionLog
from tests.support.wandb import artifact_processes as processes
from tests.support.wandb.file import read_all, records_of, written
from tests.support.wandb.serving import answering, dripping, serving
from tests.support.wandb_server import WandbServer

SYNC = "harness sync"


def made_rows(first: int, count: int) -> list[dict[str, Any]]:
    return [{"_step": step, "_timestamp": 100.5 + step, "loss": 1 / (step + 1)} for step in range(first, first + count)]


def made_log(rows: list[dict[str, Any]], *, exit_code: int | None = 0) -> TransactionLog:
    summary = {"loss": 0.5, "_wandb": {"runtime": 3}, "bad": float("nan")}
    given = {"entity": "e", "project": "p", "run_id": "r", "started_at": 1.0, "is_preempting": False}
    return TransactionLog(folder=Path(), rows=rows, summary=summary, exit_code=exit_code, **given)


class Server:
    """What the file stream does with a request, as W&B describes it: lines have numbers."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.lines = {number: json.dumps(row) for number, row in enumerate(rows)}
        self.summary: dict[str, Any] = {"old": 1, "loss": 9, "_wandb": {"kept": 1}}
        self.state = "crashed"
        self.requests_left = 1000

    def ask(self) -> AtServer:
        last = json.loads(self.lines[max(self.lines)]) if self.lines else {}
        return AtServer(count=len(self.lines), last=last, summary=self.summary, state=self.state)

    def read(self, first: int, end: int) -> Iterator[dict[str, Any]]:
        yield from (json.loads(self.lines[step]) for step in range(first, end) if step in self.lines)

    def connection(self) -> Connection:
        return Connection(ask=self.ask, read=self.read, post=self.post)

    def post(self, body: dict[str, Any]) -> None:
        self.requests_left -= 1
        if self.requests_left < 0:
            raise ConnectionError
        history = body["files"].get("wandb-history.jsonl", {"offset": 0, "content": []})
        self.lines |= dict(enumerate(history["content"], history["offset"]))
        self.state = "running"
        if "wandb-summary.json" in body["files"]:
            self.summary = json.loads(body["files"]["wandb-summary.json"]["content"][-1])
        if body.get("complete"):
            self.state = "failed" if body["exitcode"] else "finished"


@pytest.mark.parametrize("requests_before_the_kill", range(5))
def test_each_row_arrives_once_wherever_the_upload_is_killed(
    requests_before_the_kill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "BATCH_ROWS", 2)
    rows = made_rows(0, 10)
    server = Server(rows[:3])
    server.requests_left = requests_before_the_kill
    if requests_before_the_kill < 4:
        with pytest.raises(ConnectionError):
            deliver_rows(made_log(rows), server.connection())
        server.requests_left = 1000
    deliver_rows(made_log(rows), server.connection())
    assert deliver_rows(made_log(rows), server.connection()) == 0, "again: nothing is left"
    assert [json.loads(server.lines[number]) for number in range(10)] == rows
    assert len(server.lines) == 10
    assert server.state == "finished"
    assert str(server.summary.pop("bad")) == "nan"
    assert server.summary == {"old": 1, "loss": 0.5, "_wandb": {"kept": 1, "runtime": 3}}


def test_a_run_that_did_not_end_is_not_ended_by_the_upload() -> None:
    rows = made_rows(0, 4)
    server = Server(rows[:1])
    assert deliver_rows(made_log(rows, exit_code=None), server.connection()) == 3
    assert server.state == "running"


@pytest.mark.parametrize("rows", [4, 5, 9])
def test_only_the_attempt_that_wrote_the_last_row_ends_the_run(rows: int) -> None:
    server = Server(made_rows(0, rows))
    assert deliver_rows(made_log(made_rows(0, 5)), server.connection()) == 5 - min(rows, 5)
    assert server.state == ("crashed" if rows > 5 else "finished")


@pytest.mark.parametrize(
    ("rows", "at_server", "message"),
    [
        ([{"_step": 0}, {"_step": 2}], [], "one by one"),
        ([{"_step": 0}, {"_step": 0}], [], "one by one"),
        ([{"loss": 1}], [], "one by one"),
        (made_rows(5, 3), made_rows(0, 4), "W&B has 4 rows, the folder begins with row 5"),
        (made_rows(0, 6), [{"_step": step, "_timestamp": 7.0} for step in range(4)], "row 3 in W&B is another"),
        (made_rows(4, 6), [{"_step": 2 * step} for step in range(4)], "row 3 in W&B is another"),
    ],
    ids=["gap", "twice", "none", "before", "other", "numbered_otherwise"],
)
def test_rows_that_do_not_surely_follow_are_refused(rows: Any, at_server: Any, message: str) -> None:
    server = Server(at_server)
    before = dict(server.lines)
    with pytest.raises(RowsError, match=message):
        deliver_rows(made_log(rows), server.connection())
    assert server.lines == before


def test_only_the_rows_behind_the_servers_are_missing() -> None:
    attempt = made_rows(3, 4)  # a resumed attempt begins where the server ended
    for count in range(3, 8):
        server = Server(made_rows(0, count))
        assert missing(attempt, server.ask(), server.read) == made_rows(count, 7 - count)


def test_the_last_attempt_of_each_online_run_is_found(tmp_path: Path) -> None:
    for folder, start, rows in (("run-2-a", 20, 2), ("run-1-a", 10, 1), ("run-1-b", 15, 3), ("offline-run-3-a", 30, 9)):
        name = f"run-{folder[-1]}.wandb"
        written(tmp_path / "wandb" / folder / name, records_of(folder[-1], start=start, rows=rows))
    for where in (tmp_path, tmp_path / "wandb"):
        logs, problems = online_logs(where)
        assert [(log.run_id, len(log.rows)) for log in logs] == [("b", 3), ("a", 2)]
        assert problems == []
    spoilt = tmp_path / "wandb" / "run-1-b" / "run-b.wandb"
    assert [len(log.rows) for log in online_logs(spoilt.parent)[0]] == [3]
    spoilt.write_text("something else")
    logs, problems = online_logs(tmp_path)
    assert [log.run_id for log in logs] == ["a"]
    assert problems == [f"{spoilt} can't be read: it is no .wandb file"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("wandb") / "server") as started:
        yield started


def cut_run(
    server: WandbServer, folder: Path, run_id: str, *, rows: int, exit_code: int = 0, preempted: bool = False
) -> dict[str, Any]:
    """A run whose server dies half-way, when it has the first half, and stays away until the run is over."""
    before = len(server.run(run_id).rows) if run_id in [run.id for run in server.runs()] else 0
    process = processes.start(
        *("-m", "tests.support.wandb.artifact_rows", run_id, str(rows), str(exit_code)),
        *(["preempted"] if preempted else []),
        folder=folder,
        server=server,
    )
    assert process.stdout
    assert process.stdin
    while process.stdout.readline() not in ("half\n", ""):
        pass
    end = time.monotonic() + 30
    while len(server.run(run_id).rows) < before + rows // 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    server.kill()
    process.stdin.write("\n")
    process.stdin.flush()
    told = json.loads(processes.ended(process).splitlines()[-1])
    server.start()
    assert len(server.run(run_id).rows) < before + rows
    return dict(told)


def quoted(row: dict[str, Any]) -> Any:
    """A row with NaN and Infinity as W&B gives them back."""
    return json.loads(json.dumps(row), parse_constant=str)


def uploaded(server: WandbServer, folder: Path) -> str:
    done = processes.command(f"{SYNC} .", folder, server)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_what_a_dead_server_missed_is_delivered_once_by_the_command(server: WandbServer, tmp_path: Path) -> None:
    told = cut_run(server, tmp_path, "cut", rows=12)
    assert SYNC in " ".join(told["report"])
    assert "finished, 13 rows in W&B" in uploaded(server, tmp_path)
    before = sum("file_stream" in each["label"] for each in server.requests())
    assert "finished, 13 rows in W&B" in uploaded(server, tmp_path)
    assert sum("file_stream" in each["label"] for each in server.requests()) == before, "again: nothing is sent"
    run, (recorded,) = server.run("cut"), read_all(tmp_path)
    assert run.rows == [quoted(row) for row in unflattened(recorded.rows)]
    assert [row["train/global_step"] for row in run.rows] == [10 * step for step in range(13)]
    assert (run.state, run.exit_code) == ("finished", 0)
    assert run.summary["train/loss"] == 1 / 12
    assert (run.summary["train_runtime"], run.summary["train_loss"]) == (3.5, "Infinity")
    # A second attempt, which fails: its rows follow those of the first.
    cut_run(server, tmp_path, "cut", rows=8, exit_code=1)
    assert "finished, 22 rows in W&B" in uploaded(server, tmp_path)
    run = server.run("cut")
    assert [row["_step"] for row in run.rows] == list(range(13 + 9))
    assert (run.state, run.summary["train/loss"]) == ("failed", 1 / 8)
    assert server.unknown() == []


@pytest.mark.slow
def test_a_preempted_run_ends_within_seconds_and_loses_nothing(server: WandbServer, tmp_path: Path) -> None:
    told = cut_run(server, tmp_path, "preempted", rows=12, exit_code=85, preempted=True)
    assert told["seconds"] < 25, "its finish_timeout is 60 s"
    assert "finished, 13 rows in W&B" in uploaded(server, tmp_path)
    run = server.run("preempted")
    assert [row["train/global_step"] for row in run.rows] == [10 * step for step in range(13)]
    assert (run.state, run.exit_code) == ("preempted", 85)


@pytest.mark.slow
def test_a_folder_without_anything_is_bad_input(tmp_path: Path) -> None:
    done = processes.command(f"{SYNC} {tmp_path}", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no run with W&B is here or in a folder below" in done.stderr


def unflattened(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the tests' reader, which joins nested names with dots."""
    result = []
    for row in rows:
        nested: dict[str, Any] = {}
        for name, value in row.items():
            *folders, last = name.split(".")
            place = nested
            for folder in folders:
                place = place.setdefault(folder, {})
            place[last] = value
        result.append(nested)
    return result


WRONG_ANSWERS: list[Any] = [
    None,
    [],
    "x",
    {},
    {"model": [1]},
    {"model": {"bucket": [1]}},
    *(
        {"model": {"bucket": {"historyTail": "[]", "historyLineCount": 1, "summaryMetrics": "{}", **wrong}}}
        for wrong in (
            {"historyTail": "[" * 10_000},
            {"historyTail": "[1]"},
            {"historyTail": '["[]"]', "state": "x"},
            {"historyTail": 5},
            {"summaryMetrics": "null", "state": "x"},
            {"summaryMetrics": "\0"},
            {"historyLineCount": "many"},
            {"historyLineCount": 10**30, "state": "x"},
            {"historyLineCount": -1, "state": "x"},
            {},
        )
    ),
]


@pytest.mark.parametrize("answer", WRONG_ANSWERS, ids=range(len(WRONG_ANSWERS)))
def test_an_answer_of_another_form_is_no_count_and_no_traceback(answer: Any) -> None:
    with serving(answering({"data": answer})) as url:
        settings = SimpleNamespace(entity="e", project="p", run_id="r", base_url=url, api_key="k")
        assert rows_arrived(SimpleNamespace(settings=settings, offline=False)) is None


def test_an_answer_without_an_end_is_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "COUNT_TIMEOUT_SECONDS", 0.3)
    with serving(dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" ")) as url:
        settings = SimpleNamespace(entity="e", project="p", run_id="r", base_url=url, api_key="k")
        began = time.monotonic()
        assert rows_arrived(SimpleNamespace(settings=settings, offline=False)) is None
        assert time.monotonic() - began < 5


def own_rows(first: int, last: int, *, at: int = 0, ends: bool = True, clock: float = 0.0) -> list[dict[str, Any]]:
    """Rows of a training for its steps, from number `at` on, and of its end."""
    rows: list[dict[str, Any]] = [
        {"train/loss": 1 / step, "train/global_step": step} for step in range(first, last + 1)
    ]
    rows += [{"train/global_step": last}] if ends else []
    return [
        {"_step": at + number, "_timestamp": clock + number, "train/epoch": row["train/global_step"] / 10, **row}
        for number, row in enumerate(rows)
    ]


def test_rows_made_without_wandb_go_behind_the_end_that_another_folder_sent() -> None:
    before, ours = own_rows(1, 10), [*own_rows(1, 10, ends=False), *own_rows(11, 14, at=10, clock=50.0)]
    server = Server(before)
    assert deliver_rows(made_log(ours), server.connection()) == 5
    assert list(map(json.loads, server.lines.values())) == [*before, *own_rows(11, 14, at=11, clock=50.0)]
    assert deliver_rows(made_log(ours), server.connection()) == 0


def test_rows_that_another_folder_has_made_in_their_place_are_told() -> None:
    ours = own_rows(1, 10)
    again = [*own_rows(1, 5, ends=False), *own_rows(6, 14, at=5, clock=50.0)]
    for rows in (again, again[:8]):
        server = Server(rows)
        deliver_rows(made_log(ours[:9]), server.connection())  # made again with the same values
        assert [row["train/global_step"] for row in map(json.loads, server.lines.values())][:9] == list(range(1, 10))
        server = Server([*rows[:6], *({**row, "train/loss": 9.0} for row in rows[6:])])
        with pytest.raises(RowsError, match="in W&B is another than in the folder"):
            deliver_rows(made_log(ours), server.connection())
