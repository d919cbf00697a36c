"""The routes: GraphQL, file_stream, transfers, and the controls for tests."""

from __future__ import annotations

import gzip
import json
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

from ariadne import load_schema_from_path, make_executable_schema
from graphql import DocumentNode, GraphQLError, OperationDefinitionNode, execute_sync, parse, validate
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import resolve_artifacts, resolve_collections, resolve_runs, sweeps
from .artifacts import Artifacts
from .database import Database, Refused
from .faults import Fault, Faults
from .graph import Context, snake_case
from .guard import guarded, strike
from .request_log import Recorder
from .runs import Runs
from .transfers import by_digest, download, upload

SCHEMA = make_executable_schema(
    load_schema_from_path(str(Path(__file__).with_name("schema"))),
    *(
        binding
        for module in (resolve_runs, resolve_collections, resolve_artifacts, sweeps)
        for binding in module.BINDINGS
    ),
    convert_names_case=snake_case,
)


def build(folder: Path, silence_seconds: float) -> Starlette:
    """The application over the state in `folder`. Needs `state.abort`, which resets the connection of a client."""
    database = Database(folder)
    app = Starlette(
        routes=[
            Route("/graphql", graphql, methods=["POST"]),
            Route("/files/{entity}/{project}/{run}/file_stream", file_stream, methods=["POST"]),
            Route("/storage/{kind}/{number:int}{rest:path}", upload, methods=["PUT"]),
            Route("/storage/{kind}/{number:int}{rest:path}", download, methods=["GET"]),
            Route("/artifactsV2/{region}/{entity}/{project}/{collection}/{artifact}/{birth}/{md5}/{name}", by_digest),
            Route("/sdk/otel/v1/{signal}", telemetry, methods=["POST"]),
            Route("/", front_page),
            Route("/_control/faults", set_fault, methods=["POST"]),
            Route("/_control/faults", clear_faults, methods=["DELETE"]),
            Route("/_control/stop", stop_run, methods=["POST"]),
            Route("/{path:path}", unknown, methods=["GET", "POST", "PUT", "DELETE", "PATCH"]),
        ],
        middleware=[Middleware(Recorder, path=folder / "requests.jsonl")],
    )
    app.state.context = Context(database, Runs(database, silence_seconds), Artifacts(database), Faults())
    return app


async def body_of(request: Request) -> Any:
    content = await request.body()
    if request.headers.get("content-encoding") == "gzip":
        content = gzip.decompress(content)
    return json.loads(content)


@lru_cache(maxsize=256)
def checked(query: str) -> tuple[DocumentNode, str, list[GraphQLError]]:
    """A query, its name, and what the schema doesn't know of it."""
    document = parse(query)
    operations = [each for each in document.definitions if isinstance(each, OperationDefinitionNode)]
    name = operations[0].name
    return document, name.value if name else "unnamed", validate(SCHEMA, document)


@guarded
async def graphql(request: Request) -> Response:
    body = await body_of(request)
    document, name, unknowns = checked(body["query"])
    context = await strike(request, f"graphql {name}")
    if unknowns:
        request.scope["unknown"] = {"query": body["query"], "errors": [str(error) for error in unknowns]}
        return JSONResponse({"errors": [{"message": error.message} for error in unknowns]}, status_code=400)
    variables, operation = body.get("variables") or {}, body.get("operationName") or None
    result = execute_sync(SCHEMA, document, None, context, variables, operation)
    for error in result.errors or []:
        if not isinstance(error.original_error, Refused):
            told = "".join(traceback.format_exception(error.original_error)) if error.original_error else str(error)
            request.scope["unknown"] = {"query": body["query"], "variables": variables, "errors": [told]}
    return JSONResponse(result.formatted)


@guarded
async def file_stream(request: Request) -> Response:
    where = [request.path_params[name] for name in ("entity", "project", "run")]
    body = await body_of(request)
    context = await strike(request, f"file_stream {'/'.join(where)}")
    run = context.runs.require(*where)
    if context.faults.take("lose", request.scope["label"]):
        request.scope["fault"] = True
    else:
        with context.database.transaction():
            context.runs.stream(run, body)
    return JSONResponse({"exitcode": None, "limits": {}, "stopped": bool(run["stop_requested"])})


@guarded
async def telemetry(request: Request) -> Response:
    await request.body()
    await strike(request, "otel")
    return JSONResponse({})


@guarded
async def front_page(request: Request) -> Response:
    """The app in a browser; also what tells whether the server is there."""
    await strike(request, "app")
    return Response("<title>W&amp;B</title>", media_type="text/html")


@guarded
async def unknown(request: Request) -> Response:
    content = await request.body()
    request.scope["unknown"] = {"body": content[:2000].decode(errors="replace")}
    return JSONResponse({"error": "unknown to this server"}, status_code=404)


async def set_fault(request: Request) -> Response:
    request.app.state.context.faults.add(Fault(**await request.json()))
    return JSONResponse({})


async def clear_faults(request: Request) -> Response:
    request.app.state.context.faults.clear()
    return JSONResponse({})


async def stop_run(request: Request) -> Response:
    """What the app's button does: the next file_stream answer tells the client to stop."""
    given = await request.json()
    context: Context = request.app.state.context
    run = context.runs.require(given["entity"], given["project"], given["run"])
    context.database.update("runs", run["id"], stop_requested=1)
    return JSONResponse({})
