"""`python -m tests.support.wandb_server --dir DIR --port N`: serve the state in DIR until ended."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from pathlib import Path

import uvicorn

from .app import build


def end_with_parent() -> None:
    """Whoever started this holds the other end of stdin: when that is gone, so are we."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True, help="the state: kept over restarts")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one; DIR/port says which")
    parser.add_argument("--end_with_stdin", action="store_true")
    parser.add_argument("--silence_seconds", type=float, default=300.0, help="after them a run has crashed")
    options = parser.parse_args()
    app = build(options.dir, options.silence_seconds)
    quiet = {"log_level": "critical", "access_log": False}
    server = uvicorn.Server(
        uvicorn.Config(app, http="h11", ws="none", lifespan="off", timeout_graceful_shutdown=1, **quiet)
    )

    def abort(client: tuple[str, int]) -> None:
        for connection in list(server.server_state.connections):
            if connection.client == tuple(client) and connection.transport:
                connection.transport.abort()

    app.state.abort = abort
    if options.end_with_stdin:
        threading.Thread(target=end_with_parent, daemon=True).start()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", options.port))
        listener.listen(128)
        temporary = options.dir / "port.partial"
        temporary.write_text(str(listener.getsockname()[1]), encoding="utf-8")
        temporary.replace(options.dir / "port")
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()
