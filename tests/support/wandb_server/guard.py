"""Faults in front of routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .database import Refused
from .graph import Context

NOBODY_WAITS = 499


class Struck(Exception):  # noqa: N818 - not an error of ours
    """A fault has answered in place of the route."""

    def __init__(self, response: Response) -> None:
        self.response = response


def guarded(route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The route; its answer is that of a fault when one strikes inside."""

    async def serve(request: Request) -> Response:
        try:
            return await route(request)
        except Struck as struck:
            request.scope["fault"] = True
            return struck.response
        except Refused as error:
            return JSONResponse({"error": str(error)}, status_code=404)
        except ClientDisconnect:
            return Response(status_code=NOBODY_WAITS)

    return serve


async def abort(request: Request) -> Response:
    """Reset the connection."""
    request.app.state.abort(request.scope["client"])
    await asyncio.sleep(0.05)  # uvicorn learns of it, and sends nothing more
    return Response(status_code=NOBODY_WAITS)


async def without_end(chunk: bytes, pause: float) -> AsyncIterator[bytes]:
    """The body of an answer, until nobody reads it any more."""
    while True:
        yield chunk
        await asyncio.sleep(pause)


async def strike(request: Request, label: str, *, transfer: bool = False) -> Context:
    """Name the request in the log and let faults strike it. Raises Struck."""
    request.scope["label"] = label
    context: Context = request.app.state.context
    # Of a transfer the body is still to come, and `is_disconnected` would swallow it.
    if await context.faults.hang(label) and not transfer and await request.is_disconnected():
        raise Struck(Response(status_code=NOBODY_WAITS))
    if fault := context.faults.take("status", label):
        reason = {"errors": [{"message": fault.message}], "data": None}
        body = reason if fault.message else {"error": "a fault was asked for"}
        raise Struck(JSONResponse(body, status_code=fault.code))
    if context.faults.take("error", label):
        raise Struck(JSONResponse({"data": None, "errors": [{"message": "a fault was asked for"}]}))
    for kind, chunk, pause in (("drip", b" ", 0.5), ("endless", bytes(1 << 20), 0.01)):
        if context.faults.take(kind, label):
            raise Struck(StreamingResponse(without_end(chunk, pause), media_type="application/json"))
    if not transfer and context.faults.take("drop", label):
        raise Struck(await abort(request))
    return replace(context, base_url=str(request.base_url).rstrip("/"))
