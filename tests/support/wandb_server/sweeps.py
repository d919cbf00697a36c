"""Sweeps: their points, handed to agents as runs; runs that agents are told to resume and to stop. GraphQL to them."""

from __future__ import annotations

import itertools
import json
import secrets
import string
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from ariadne import MutationType, ObjectType

from .database import Refused, Row, now
from .graph import Context, connection, id_of, ids, mutates

OPEN = ("RUNNING", "PENDING")  # the states of a sweep that begins runs

mutation, project, sweep, run = MutationType(), ObjectType("Project"), ObjectType("Sweep"), ObjectType("Run")
BINDINGS = [mutation, project, sweep, run]

sweep.set_field("id", ids("Sweep"))
run.set_field("exitcode", lambda row, _: row["exit_code"])
run.set_field("shouldStop", lambda row, _: bool(row["stop_requested"]))
run.set_field("failed", lambda row, _: bool(row["exit_code"]))
run.set_field("running", lambda row, info: info.context.runs.state(row) == "running")


def points(parameters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All combinations, as W&B's grid goes through them: the last parameter varies fastest. Nested ones are values."""

    def values_of(entry: Mapping[str, Any]) -> list[Any]:
        if "parameters" in entry:
            return list(points(entry["parameters"]))
        return entry["values"] if "values" in entry else [entry["value"]]

    for values in itertools.product(*map(values_of, parameters.values())):
        yield dict(zip(parameters, values, strict=True))


@project.field("sweep")
def sweep_named(row: Row, info: Any, sweep_name: str) -> Row | None:
    return info.context.database.one("SELECT * FROM sweeps WHERE project_id = ? AND name = ?", row["id"], sweep_name)


@sweep.field("method")
def method(row: Row, _: Any) -> str:
    return str(yaml.safe_load(row["config"])["method"])


@sweep.field("project")
def project_of(row: Row, info: Any) -> Row | None:
    return info.context.database.get("projects", row["project_id"])


def runs_of(context: Context, row: Row) -> list[Row]:
    return context.database.all(
        "SELECT * FROM runs WHERE project_id = ? AND sweep_name = ? ORDER BY id", row["project_id"], row["name"]
    )


@sweep.field("runs")
def runs(row: Row, info: Any) -> Any:
    return connection(runs_of(info.context, row))


@mutates(mutation, "upsertSweep")
def upsert(info: Any, given: Row) -> Any:
    values = {name: given[name] for name in ("config", "description", "state") if given.get(name) is not None}
    if given.get("id"):
        number = info.context.require("sweeps", given["id"])["id"]
    else:
        where = info.context.project(given.get("entity_name"), given.get("project_name"), create=True)
        name = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
        number = info.context.database.insert("sweeps", project_id=where["id"], name=name, config="", created_at=now())
    info.context.database.update("sweeps", number, **values)
    return {"sweep": info.context.database.get("sweeps", number), "config_validation_warnings": []}


@mutates(mutation, "createAgent")
def create_agent(info: Any, given: Row) -> Any:
    where = info.context.require_project(given.get("entity_name"), given.get("project_name"))
    found = sweep_named(where, info, given["sweep"])
    if not found:
        raise Refused(f"sweep {given['sweep']} not found")
    number = info.context.database.insert("agents", sweep_id=found["id"], host=given["host"])
    return {"agent": {"id": id_of("Agent", number)}}


@mutates(mutation, "agentHeartbeat")
def heartbeat(info: Any, given: Row) -> Any:
    context: Context = info.context
    agent = context.require("agents", given["id"])
    found = context.database.get("sweeps", agent["sweep_id"])
    assert found
    reported = json.loads(given.get("run_state") or "{}")
    return {"agent": {"id": given["id"]}, "commands": json.dumps(commands(context, found, list(reported)))}


def commands(context: Context, row: Row, reported: list[str]) -> list[Row]:
    """
    What an agent with these runs is to do.

    It has one run at a time. A stop is repeated until the run is gone: the agent kills what does not heed the first.
    """
    of_sweep = runs_of(context, row)
    if reported:
        stops = {each["name"] for each in of_sweep if each["stop_requested"] or row["state"] == "CANCELED"}
        return [{"type": "stop", "run_id": name} for name in reported if name in stops]
    if row["state"] in OPEN:
        preempted = [each for each in of_sweep if context.runs.state(each) == "preempted"]
        if preempted:
            # As W&B does it: with all that the run's configuration has.
            return [_started(context, row, preempted[0], "resume", json.loads(preempted[0]["config"]))]
        config = yaml.safe_load(row["config"])
        assert config["method"] == "grid", "the other methods are the cloud's"
        if point := next(itertools.islice(points(config["parameters"]), len(of_sweep), None), None):
            return [_started(context, row, _new_run(context, row), "run", point_as_args(point))]
        if any(context.runs.state(each) in ("running", "pending") for each in of_sweep):
            return []  # another agent's, which may come back
        context.database.update("sweeps", row["id"], state="FINISHED")
    return [{"type": "exit"}]


def point_as_args(point: Mapping[str, Any]) -> Row:
    return {name: {"value": value} for name, value in point.items()}


def _new_run(context: Context, row: Row) -> Row:
    where = context.database.get("projects", row["project_id"])
    assert where
    name = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    given = {"model_name": where["name"], "name": name, "sweep": row["name"]}
    return context.runs.upsert(given, run_id=None, entity=where["entity"])[0]


def _started(context: Context, row: Row, begun: Row, kind: str, args: Row) -> Row:
    # A run that is resumed is told by its id, not by its name: that it begins again is known from here.
    again: Row = {"exit_code": None, "preempting": 0, "stop_requested": 0}
    changes = {"state": "pending"} | (again if kind == "resume" else {"config": json.dumps(args)})
    context.database.update("runs", begun["id"], **changes)
    program = yaml.safe_load(row["config"]).get("program", "")
    return {"type": kind, "run_id": begun["name"], "program": program, "args": args}
