"""Who may ask, and the log of what was asked: one JSON line a request, flushed."""

from __future__ import annotations

import base64
import json
import time
import traceback
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import API_KEY

# In the cloud the addresses of files carry their permission in themselves.
FREE = ("/storage/", "/sdk/otel/")


class Recorder:
    """Refuse wrong keys; write down each request. Routes leave `label`, `fault` and `unknown` in the scope."""

    def __init__(self, app: ASGIApp, path: Path) -> None:
        self._app = app
        self._file = path.open("a", encoding="utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/_control/"):
            await self._app(scope, receive, send)
            return
        began, status = time.time(), 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"] == "/" or scope["path"].startswith(FREE) or _has_key(scope):
                await self._app(scope, receive, watch)
            else:
                await JSONResponse({"error": "invalid API key"}, status_code=401)(scope, receive, watch)
        except Exception:
            scope["unknown"] = {"errors": [traceback.format_exc()]}
            raise
        finally:
            self._write(scope, began, status)

    def _write(self, scope: Scope, began: float, status: int) -> None:
        entry: dict[str, Any] = {"time": began, "seconds": time.time() - began, "method": scope["method"]}
        entry |= {"path": scope["path"], "label": scope.get("label", ""), "status": status}
        entry |= {name: scope[name] for name in ("fault", "unknown") if name in scope}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


def _has_key(scope: Scope) -> bool:
    expected = base64.b64encode(f"api:{API_KEY}".encode())
    return any(name == b"authorization" and value == b"Basic " + expected for name, value in scope["headers"])
