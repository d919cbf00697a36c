"""
HTTP exchanges that end, whatever the server does: a deadline for the whole of each, a bound for what it may answer.

A timeout of `requests` is for one read of the socket. A server that sends a byte now and then, or never ends its
answer, would hold its caller for ever and fill the memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests

MOST_BYTES = 64 << 20  # of an answer that is kept in memory
CHUNK_BYTES = 128 << 10
SLOWEST = 10_000  # bytes a second: a transfer that is slower for as long as its patience is given up
MOST_REDIRECTS = 5
REDIRECTS, REDIRECTS_OF_GET = (307, 308), (301, 302, 303)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of a server; `body` is empty where it was not asked for."""

    url: str
    status: int
    body: bytes

    def check(self) -> None:
        """Raise requests.HTTPError unless the request has succeeded."""
        if not 200 <= self.status < 300:
            raise requests.HTTPError(f"{shown(self.url)} answers {self.status}")


def shown(url: str) -> str:
    """Return an address for a message: without a user, a password and the signature of a signed one."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def ask(
    method: str, url: str, *, seconds: float, most_bytes: int = MOST_BYTES, is_read: bool = True, **request: Any
) -> Answer:
    """
    Send a request and return the answer, all of it within `seconds`; `request` goes to `requests`.

    The body is left unread unless `is_read`. Raises requests.RequestException.
    """
    chunks: list[bytes] = []
    exchange = _Exchange(method, url, request, take=chunks.append if is_read else None, most_bytes=most_bytes)
    status = exchange.run(seconds)
    return Answer(url=url, status=status, body=b"".join(chunks))


def receive(url: str, take: Callable[[bytes], object], *, size: int, patience: float, **request: Any) -> None:
    """
    Stream a body of `size` bytes to `take`, which another thread calls.

    Raises requests.RequestException for another status than 200, for more bytes, and if fewer than SLOWEST a second
    have come for `patience` seconds; and what `take` raises.
    """
    headers = {"Accept-Encoding": "identity", **request.pop("headers", {})}
    exchange = _Exchange("GET", url, {**request, "headers": headers}, take=take, most_bytes=size, only_status=200)
    Answer(url=url, status=exchange.run(patience, is_extended=True), body=b"").check()


def send(url: str, body: Any, *, size: int, patience: float, headers: dict[str, str]) -> None:
    """
    Put `size` bytes, which `body` is or has to be read, to an address.

    Raises requests.RequestException unless they are taken, and as `receive` if they do not move.
    """
    exchange = _Exchange("PUT", url, {"headers": {**headers, "Content-Length": str(size)}}, take=None, most_bytes=0)
    # requests takes an empty stream for one of unknown length.
    exchange.request["data"] = (_Counted(body, size, exchange) if hasattr(body, "read") else body) if size else b""
    Answer(url=url, status=exchange.run(patience, is_extended=True), body=b"").check()


class _Counted:
    """A file that says how much of it has been read, and may be read again after a redirect."""

    def __init__(self, file: Any, size: int, exchange: _Exchange) -> None:
        self._file, self._size, self._exchange = file, size, exchange

    def __len__(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        self._exchange.moved += len(data)
        return data

    def __iter__(self) -> Iterator[bytes]:  # without it requests takes the object for a form
        return iter(lambda: self.read(CHUNK_BYTES), b"")

    def rewind(self) -> None:
        self._file.seek(0)


class _Exchange:
    """
    One request and its answer, in a thread of its own, which is left behind if it does not end in time.

    Only another thread can end the reading of headers that come byte by byte; the one left behind ends with them.
    """

    def __init__(
        self,
        method: str,
        url: str,
        request: dict[str, Any],
        *,
        take: Callable[[bytes], object] | None,
        most_bytes: int,
        only_status: int | None = None,
    ) -> None:
        self.request, self.moved = request, 0
        self._seconds = 0.0
        self._method, self._url, self._take, self._most_bytes = method, url, take, most_bytes
        self._only_status = only_status
        self._done, self._is_given_up = threading.Event(), False
        self._response: requests.Response | None = None
        self._error: Exception | None = None
        self._status = 0

    def run(self, seconds: float, *, is_extended: bool = False) -> int:
        """Return the status. `is_extended`: the time is `seconds` again as long as bytes move, SLOWEST at least."""
        self._seconds = seconds
        threading.Thread(target=self._work, name="wandb-http", daemon=True).start()
        try:
            while True:
                before = self.moved
                if self._done.wait(seconds):
                    break
                if not is_extended or self.moved - before < SLOWEST * seconds:
                    moved = f", {self.moved} bytes came or went" if is_extended else ""
                    raise requests.Timeout(f"{shown(self._url)} did not answer whole within {seconds:g} s{moved}")
        finally:
            self._give_up()
        if self._error is not None:
            raise self._error
        return self._status

    def _give_up(self) -> None:
        self._is_given_up = True
        response = self._response
        if not self._done.is_set() and response is not None:
            # Not close(): it waits for the lock that the thread holds while it reads. Older versions have no shutdown.
            with suppress(AttributeError, OSError, ValueError, RuntimeError):
                response.raw.shutdown()
            self._done.wait(1)

    def _work(self) -> None:
        try:
            self._exchange()
        except Exception as error:  # raised by `run`, in the thread that asked
            self._error = error
        finally:
            self._done.set()

    def _exchange(self) -> None:
        method, url = self._method, self._url
        for _ in range(MOST_REDIRECTS + 1):
            # The redirects that requests follows it reads to their end, however long they are.
            given = {"stream": True, "allow_redirects": False, **self.request}
            with requests.request(method, url, timeout=self._seconds, **given) as response:
                self._response, self._status = response, response.status_code
                where = response.headers.get("location")
                follows = self._take is not None or method == "PUT"
                is_redirect = self._status in REDIRECTS or (self._status in REDIRECTS_OF_GET and method == "GET")
                if not (where and follows and is_redirect):
                    self._read(response)
                    return
            url = self._redirected(url, where)
        raise requests.TooManyRedirects(f"{shown(self._url)} redirects more than {MOST_REDIRECTS} times")

    def _redirected(self, url: str, where: str) -> str:
        target = urljoin(url, where)
        if urlsplit(target).netloc != urlsplit(url).netloc:
            self.request.pop("auth", None)
        if isinstance(body := self.request.get("data"), _Counted):
            body.rewind()
        return target

    def _read(self, response: requests.Response) -> None:
        if self._take is None or self._only_status not in (None, self._status):
            return
        length, size = response.headers.get("content-length", ""), 0
        if length.isdecimal() and int(length[:20]) > self._most_bytes:
            raise self._too_long()
        for chunk in response.iter_content(CHUNK_BYTES):
            if self._is_given_up:
                return
            size += len(chunk)
            if size > self._most_bytes:
                raise self._too_long()
            self._take(chunk)
            self.moved = size

    def _too_long(self) -> requests.RequestException:
        return requests.RequestException(f"{shown(self._url)} answers more than {self._most_bytes} bytes")
