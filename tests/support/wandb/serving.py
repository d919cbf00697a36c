"""A server that answers every request in the same way, down to the bytes: badly, slowly, without an end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

Answering = Callable[[socket.socket, bytes], object]  # the connection, and what was asked


@contextmanager
def serving(answering: Answering) -> Iterator[str]:
    """A server that answers each connection so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        is_over = threading.Event()

        def answer(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                connection.settimeout(5)
                answering(connection, connection.recv(65536))

        def serve() -> None:
            while not is_over.is_set():
                with suppress(TimeoutError):
                    threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            is_over.set()
            thread.join()


def dripping(begin: bytes, each: bytes, pause: float = 0.05) -> Answering:
    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(begin)
        while True:
            connection.sendall(each)
            time.sleep(pause)

    return answer


def answering(value: Any) -> Answering:
    """Answers this, as JSON."""
    text = json.dumps(value).encode()
    return lambda connection, _: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
