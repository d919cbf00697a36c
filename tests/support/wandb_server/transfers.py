"""Uploads and downloads of contents, cut or damaged where a fault says so."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .database import Refused
from .faults import Faults
from .graph import Context
from .guard import Struck, abort, guarded, strike

CHUNK_BYTES = 1 << 18


def stored_at(request: Request) -> tuple[Path, str]:
    """The file that a storage address means, and its name in labels."""
    context: Context = request.app.state.context
    kind, number = request.path_params["kind"], request.path_params["number"]
    rest = request.path_params["rest"].lstrip("/")
    row = context.database.get("runs" if kind == "run" else "artifacts", number)
    if not row:
        raise Refused("no such place")
    if kind == "run":
        return context.runs.file_path(row, rest), f"run/{rest}"
    if kind == "manifest":
        return context.artifacts.manifest_path(row), f"manifest/{number}"
    md5, _, name = rest.partition("/")
    return context.artifacts.blob_of(row, md5), f"artifact/{name}"


@guarded
async def upload(request: Request) -> Response:
    path, name = stored_at(request)
    label = f"put {name}"
    context = await strike(request, label, transfer=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name[:100]}.{id(request)}.part")
    try:
        with part.open("wb+") as file:
            size, md5 = await receive(request, context.faults, label, file)
            if request.headers.get("content-md5") not in (None, md5):
                return JSONResponse({"error": "BadDigest"}, status_code=400)
            if size and context.faults.take("corrupt", label):
                file.seek(0)
                first = file.read(1)
                file.seek(0)
                file.write(bytes([first[0] ^ 255]))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    if request.path_params["kind"] == "run":
        context.runs.add_file(request.path_params["number"], name.removeprefix("run/"), size, md5)
    return Response()


async def receive(request: Request, faults: Faults, label: str, file: Any) -> tuple[int, str]:
    """Write the body to `file`. Returns its size and base64 MD5. Raises Struck when a fault cuts it."""
    cut, slow = faults.take("drop", label), faults.take("throttle", label)
    size, md5 = 0, hashlib.md5(usedforsecurity=False)
    async for chunk in request.stream():
        size += len(chunk)
        md5.update(chunk)
        file.write(chunk)
        if cut and size >= cut.after_bytes:
            break
        if slow:
            await asyncio.sleep(len(chunk) / slow.bytes_per_second)
    if cut:
        raise Struck(await abort(request))
    return size, base64.b64encode(md5.digest()).decode()


@guarded
async def download(request: Request) -> Response:
    """What is kept, or in its place what a test has put beside it, which the server itself does not read."""
    path, name = stored_at(request)
    other = path.with_name(f"{path.name}.served")
    return await send(request, other if other.exists() else path, f"get {name}")


@guarded
async def by_digest(request: Request) -> Response:
    """The address that the client makes up for a single file."""
    given, context = request.path_params, request.app.state.context
    owner = context.require("artifacts", given["artifact"])
    return await send(request, context.artifacts.blob_of(owner, given["md5"]), f"get artifact/{given['name']}")


async def send(request: Request, path: Path, label: str) -> Response:
    context = await strike(request, label, transfer=True)
    if not path.exists():
        return JSONResponse({"error": "no such file"}, status_code=404)
    cut, size = context.faults.take("drop", label), path.stat().st_size
    slow = context.faults.take("throttle", label)

    async def parts() -> AsyncIterator[bytes]:
        left = min(cut.after_bytes, size) if cut else size
        with path.open("rb") as file:
            while left:
                chunk = file.read(min(slow.bytes_per_second if slow else CHUNK_BYTES, left))
                left -= len(chunk)
                yield chunk
                if slow:
                    await asyncio.sleep(1)
        if cut:
            request.scope["fault"] = True
            await asyncio.sleep(0.05)  # let what was sent leave
            await abort(request)

    return StreamingResponse(parts(), headers={"Content-Length": str(size)})
