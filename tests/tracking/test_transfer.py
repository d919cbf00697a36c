"""Servers that answer without an end: each exchange of ours has a deadline, and takes so much and no more."""

from __future__ import annotations

import io
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from harness.tracking import transfer
from harness.tracking.client import why_silent
from tests.support.faulty_training import Training
from tests.support.wandb import artifact_processes as processes
from tests.support.wandb.serving import Answering, dripping, serving
from tests.support.wandb_server import WandbServer

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n1234"

ENDLESS = {
    "headers": dripping(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
    "body": dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
    "chunks": dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "silence": lambda *_: time.sleep(4),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_an_answer_that_does_not_end_is_given_up_at_the_deadline(what: str) -> None:
    with serving(ENDLESS[what]) as url:
        began = time.monotonic()
        with pytest.raises(requests.RequestException):
            transfer.ask("GET", url, seconds=0.3)
        with pytest.raises(requests.RequestException):
            transfer.receive(url, list[bytes]().append, size=1_000_000, patience=0.3)
        with suppress(requests.RequestException):  # what follows the headers does not matter there
            transfer.send(url, io.BytesIO(b"1" * 1000), size=1000, patience=0.3, headers={})
        assert time.monotonic() - began < 3.5


@pytest.mark.parametrize("length", [b"", b"Content-Length: 99999999999\r\n"])
def test_no_more_is_taken_than_was_asked_for(length: bytes) -> None:
    begin, taken = b"HTTP/1.1 200 OK\r\n" + length + b"\r\n", list[bytes]()
    with serving(dripping(begin, b"x" * 100_000, pause=0.0)) as url:
        with pytest.raises(requests.RequestException, match="answers more than 1000000 bytes"):
            transfer.ask("GET", url, seconds=20, most_bytes=1_000_000)
        with pytest.raises(requests.RequestException, match="answers more than 1000000 bytes"):
            transfer.receive(url, taken.append, size=1_000_000, patience=20)
    assert sum(map(len, taken)) <= 1_000_000


def test_whether_a_server_is_there_is_known_from_its_first_line() -> None:
    with serving(ENDLESS["body"]) as url:
        began = time.monotonic()
        assert why_silent(url, timeout=20) is None
        assert time.monotonic() - began < 5
    with serving(ENDLESS["headers"]) as url:
        assert why_silent(url, timeout=0.3) == f"{url}: Timeout"


def test_a_slow_transfer_goes_on_as_long_as_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1000)
    taken: list[bytes] = []

    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n")
        for _ in range(10):
            connection.sendall(b"x" * 2000)
            time.sleep(0.05)

    with serving(answer) as url:
        transfer.receive(url, taken.append, size=20_000, patience=0.2)
    assert b"".join(taken) == b"x" * 20_000


def test_redirects_are_followed_a_few_times_and_take_no_key_elsewhere() -> None:
    def to(url: str) -> Answering:
        text = f"HTTP/1.1 307 Elsewhere\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n"
        return lambda connection, _: connection.sendall(text.encode())

    asked: list[bytes] = []

    def whole(connection: socket.socket, request: bytes) -> None:
        asked.append(request)
        connection.sendall(WHOLE)

    with serving(whole) as other, serving(to(f"{other}/x")) as url:
        assert transfer.ask("GET", url, seconds=5, auth=("api", "secret")).body == b"1234"
        assert transfer.ask("GET", other, seconds=5, auth=("api", "secret")).body == b"1234"
        transfer.send(url, io.BytesIO(b"12"), size=2, patience=5, headers={"X-Mine": "1"})
        taken: list[bytes] = []
        transfer.receive(url, taken.append, size=4, patience=5)
    assert b"".join(taken) == b"1234"
    assert [b"Authorization" in request for request in asked] == [False, True, False, False]
    assert b"Content-Length: 2\r\n" in asked[2]
    assert b"Transfer-Encoding" not in asked[2]
    with serving(to("/again")) as url, pytest.raises(requests.TooManyRedirects):
        transfer.ask("GET", url, seconds=5)
    with serving(to("file:///etc/passwd")) as url, pytest.raises(requests.RequestException):
        transfer.ask("GET", url, seconds=5)


def test_only_a_web_server_is_asked() -> None:
    for url in ("file:///etc/passwd", "ftp://host/x", "", "//host"):
        with pytest.raises(requests.RequestException):
            transfer.ask("GET", url, seconds=1)


def test_a_message_shows_no_key_that_is_in_an_address() -> None:
    shown = transfer.shown("https://user:secret@host:1/path?X-Signature=secret")
    assert shown == "https://host:1/path"


@pytest.mark.slow
def test_a_training_begins_where_the_front_page_has_no_end(tmp_path: Path) -> None:
    with WandbServer(tmp_path / "server") as server:
        server.fault("drip", "app")
        training = Training(tmp_path / "run", server, wandb_log_model=None).ended()
        assert len(server.run("run").rows) > 30
    assert "step 30/30" in training.out


OPEN = """
from harness.tracking.flags import TrackingConfig
from harness.tracking.run import open as opening
opening.INIT_TIMEOUT_SECONDS = 2
run = opening.open_run(TrackingConfig(), {}, stop=lambda: None)
run.finish()
print("offline", run.offline)
"""


@pytest.mark.slow
def test_a_run_is_kept_offline_where_no_answer_has_an_end(tmp_path: Path) -> None:
    with WandbServer(tmp_path / "server") as server:
        server.fault("drip", "^(app|graphql|file_stream)")  # wandb's own telemetry waits a minute at its exit
        assert "offline True" in processes.ended(processes.start("-c", OPEN, folder=tmp_path / "run", server=server))
