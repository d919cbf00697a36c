"""GraphQL to `Runs`: who is asking, projects, runs."""

from __future__ import annotations

import json
import math
import time
from datetime import datetime, timezone
from typing import Any
from urllib.parse import quote

from ariadne import MutationType, ObjectType, QueryType

from .database import Row
from .graph import ORG_ENTITY, ORGANIZATION, USER, connection, id_of, ids, like, matches, mutates, number_of
from .runs import EVENTS, HISTORY, OUTPUT

# What a current server has, as far as this one serves it.
FEATURES = (
    "LARGE_FILENAMES",
    "ARTIFACT_TAGS",
    "CLIENT_IDS",
    "STRUCTURED_CONSOLE_LOGS",
    "ARTIFACT_COLLECTION_MEMBERSHIP_FILES",
    "USE_ARTIFACT_WITH_ENTITY_AND_PROJECT_INFORMATION",
    "PROJECT_ARTIFACT_COLLECTION_MEMBERSHIP",
    "ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE",
    "TOTAL_COUNT_IN_FILE_CONNECTION",
    "ARTIFACT_V2_DOWNLOAD_HANDLER_SUPPORTS_ARTIFACT_ID",
    "MARK_RUN_FILES_UPLOADED",
    "FILESTREAM_GZIP",
    "ARTIFACT_DIGEST_ALGORITHM",
)

query, mutation = QueryType(), MutationType()
user, entity, organization = ObjectType("User"), ObjectType("Entity"), ObjectType("Organization")
project, run, run_file = ObjectType("Project"), ObjectType("Run"), ObjectType("RunFile")
BINDINGS = [query, mutation, user, entity, organization, project, run, run_file]

project.set_field("id", ids("Project"))
project.set_field("internalId", lambda row, _: row["id"])
project.set_field("entityName", lambda row, _: row["entity"])
project.set_field("entity", lambda row, _: {"id": id_of("Entity", row["entity"]), "name": row["entity"]})
project.set_field("readOnly", lambda *_: False)
project.set_field("isBenchmark", lambda *_: False)
project.set_field("allowAllArtifactTypesInRegistry", lambda *_: True)
run.set_field("id", ids("Run"))
run.set_field("group", lambda row, _: row["group_name"])
run.set_field("commit", lambda row, _: row["git_commit"])
run.set_field("stopped", lambda row, _: bool(row["stop_requested"]))
run.set_field("tags", lambda row, _: json.loads(row["tags"]))
run.set_field("readOnly", lambda *_: False)
run.set_field("user", lambda *_: the_user())
entity.set_field("entityType", lambda *_: "team")
entity.set_field("xxhashDigestsEnabled", lambda *_: False)
entity.set_field("organization", lambda *_: the_organization())
entity.set_field("project", lambda row, info, name=None: info.context.project(row["name"], name))
organization.set_field("orgEntity", lambda *_: {"id": id_of("Entity", ORG_ENTITY), "name": ORG_ENTITY})
organization.set_field("featureFlags", lambda *_, **__: [])


def the_user() -> dict[str, Any]:
    who = {"id": id_of("User", 1), "name": USER, "username": USER, "email": f"{USER}@example.com", "entity": USER}
    return {**who, "admin": False, "flags": "{}", "teams": {"edges": []}, "api_keys": {"edges": []}}


def the_organization() -> dict[str, Any]:
    return {"id": id_of("Organization", 1), "name": ORGANIZATION}


@query.field("viewer")
def viewer(*_: Any) -> Any:
    return the_user()


@user.field("organizations")
def organizations(*_: Any) -> Any:
    return [the_organization()]


@query.field("serverInfo")
def server_info(*_: Any) -> Any:
    return {"features": [{"name": name, "is_enabled": True} for name in FEATURES]}


@query.field("entity")
def entity_named(_: Any, info: Any, name: str | None = None) -> Any:
    return {"id": id_of("Entity", name or USER), "name": name or USER}


@query.field("organization")
def organization_named(_: Any, info: Any, name: str) -> Any:
    return the_organization() if name in (ORGANIZATION, ORG_ENTITY) else None


@query.field("model")
@query.field("project")
def project_named(_: Any, info: Any, name: str | None = None, entity_name: str | None = None) -> Any:
    return info.context.project(entity_name, name)


@query.field("models")
def projects(_: Any, info: Any, entity_name: str | None = None, **page: Any) -> Any:
    found = info.context.database.all("SELECT * FROM projects WHERE entity = ?", entity_name or USER)
    return connection(found, **page)


@mutates(mutation, "upsertModel")
def upsert_project(info: Any, given: Row) -> Any:
    inserted = not info.context.project(given.get("entity_name"), given["name"])
    made = info.context.project(given.get("entity_name"), given["name"], create=True)
    return {"model": made, "project": made, "inserted": inserted}


# Runs


@project.field("bucket")
@project.field("run")
def run_named(row: Row, info: Any, name: str, missing_ok: bool = False) -> Any:
    return info.context.runs.find(row["entity"], row["name"], name)


def passing(row: Row, info: Any, filters: str | None) -> list[Row]:
    found = info.context.database.all("SELECT * FROM runs WHERE project_id = ? ORDER BY id", row["id"])
    return [each for each in found if matches(json.loads(filters or "{}"), as_filtered(info, each))]


def as_filtered(info: Any, row: Row) -> Row:
    names = {"displayName": row["display_name"], "jobType": row["job_type"], "group": row["group_name"]}
    config, summary = json.loads(row["config"]), json.loads(row["summary_metrics"])
    values = {"state": info.context.runs.state(row), "tags": json.loads(row["tags"]), "name": row["name"]}
    return {**names, **values, "display_name": row["display_name"], "config": config, "summary_metrics": summary}


@project.field("runCount")
def run_count(row: Row, info: Any, filters: str | None = None) -> int:
    return len(passing(row, info, filters))


@project.field("runs")
def runs_of(row: Row, info: Any, filters: str | None = None, order: str | None = None, **page: Any) -> Any:
    found = passing(row, info, filters)
    return connection(found[::-1] if (order or "").startswith("-") else found, **page)


@run.field("project")
def project_of(row: Row, info: Any) -> Any:
    return info.context.database.get("projects", row["project_id"])


@run.field("state")
def state(row: Row, info: Any) -> str:
    return str(info.context.runs.state(row))


@run.field("heartbeatAt")
def heartbeat_at(row: Row, _: Any) -> str:
    return datetime.fromtimestamp(row["heartbeat"] or time.time(), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@run.field("wandbConfig")
def wandb_config(row: Row, _: Any, keys: list[str] | None = None) -> str:
    own = json.loads(row["config"]).get("_wandb", {}).get("value", {})
    return json.dumps({key: own[key] for key in keys or own if key in own})


for name, file in {"history": HISTORY, "events": EVENTS, "log": OUTPUT}.items():
    run.set_field(f"{name}LineCount", lambda row, info, file=file: info.context.runs.count(row, file))
    if name != "log":
        run.set_field(f"{name}Tail", lambda row, info, file=file: info.context.runs.tail(row, file))


@run.field("historyKeys")
def history_keys(row: Row, info: Any) -> Any:
    rows = info.context.runs.rows(row)
    last = max((each.get("_step", -1) for each in rows), default=-1)
    return {"lastStep": last, "sets": [], "keys": {key: {} for each in rows for key in each}}


@run.field("history")
def history(row: Row, info: Any, min_step: int = 0, max_step: int | None = None, samples: int | None = None) -> Any:
    lines = zip(info.context.runs.rows(row), info.context.runs.lines(row, HISTORY), strict=True)
    kept = [line for at, line in lines if min_step <= at["_step"] and (max_step is None or at["_step"] < max_step)]
    return kept[:samples]


@run.field("events")
def events(row: Row, info: Any, samples: int | None = None) -> Any:
    return info.context.runs.lines(row, EVENTS)[:samples]


@run.field("sampledHistory")
def sampled_history(row: Row, info: Any, specs: list[str]) -> Any:
    """Evenly spaced ones of the rows that have all the keys, from minStep to maxStep, both included."""
    rows, answer = info.context.runs.rows(row), []
    for spec in map(json.loads, specs):
        keys, low, high = spec.get("keys") or [], spec.get("minStep", 0), spec.get("maxStep", math.inf)
        wanted = [each for each in rows if low <= each["_step"] <= high and all(key in each for key in keys)]
        count = min(len(wanted), spec.get("samples") or 500)
        sample = [wanted[number * len(wanted) // count] for number in range(count)]
        answer.append([{key: each[key] for key in keys or each} for each in sample])
    return answer


@run.field("parquetHistory")
def parquet_history(*_: Any, **__: Any) -> Any:
    return {"parquet_urls": [], "live_data": []}


@run.field("logLines")
def log_lines(row: Row, info: Any, last: int | None = None, use_improved_pagination: bool = True, **page: Any) -> Any:
    lines = [{"number": at, "line": line} for at, line in enumerate(info.context.runs.lines(row, OUTPUT))]
    return connection(lines[-last:] if last else lines, **page)


@mutates(mutation, "upsertBucket")
def upsert(info: Any, given: Row) -> Any:
    number = number_of(given["id"]) if given.get("id") else None
    bucket, inserted = info.context.runs.upsert(given, run_id=number, entity=given.get("entity_name") or USER)
    return {"bucket": bucket, "inserted": inserted}


@mutates(mutation, "deleteRun")
def delete_run(info: Any, given: Row) -> Any:
    info.context.runs.delete(info.context.require("runs", given["id"]))
    return {}


@mutates(mutation, "stopRun")
def stop_run(info: Any, given: Row) -> Any:
    info.context.database.update("runs", info.context.require("runs", given["id"])["id"], stop_requested=1)
    return {"success": True}


@mutates(mutation, "updateRunState")
def update_run_state(info: Any, given: Row) -> Any:
    info.context.database.update("runs", info.context.require("runs", given["id"])["id"], state=given["state"])
    return {"success": True}


@mutates(mutation, "notifyScriptableRunAlert")
def alert(info: Any, given: Row) -> Any:
    about = info.context.runs.require(given.get("entity_name") or USER, given["project_name"], given["run_name"])
    values = {"title": given["title"], "text": given["text"], "severity": given.get("severity")}
    info.context.database.insert("alerts", run_id=about["id"], **values)
    return {"success": True}


# Files of runs


def url(info: Any, row: Row, name: str) -> str:
    return f"{info.context.base_url}/storage/run/{row['id']}/{quote(name)}"


@run.field("fileCount")
def file_count(row: Row, info: Any) -> int:
    return len(info.context.runs.files(row))


@run.field("files")
def files(row: Row, info: Any, names: list[str] | None = None, pattern: str | None = None, **page: Any) -> Any:
    found = info.context.runs.files(row)
    kept = [each for each in found if (not names or each["name"] in names)]
    kept = [each for each in kept if not pattern or like(pattern).fullmatch(each["name"])]
    return connection([as_file(info, row, each) for each in kept], **page)


def as_file(info: Any, row: Row, file: Row) -> Row:
    where = url(info, row, file["name"])
    known = {"id": id_of("File", file["id"]), "name": file["name"], "size_bytes": file["size"], "md5": file["md5"]}
    return {**known, "url": where, "direct_url": where, "updated_at": file["updated_at"], "mimetype": None}


@mutates(mutation, "createRunFiles")
def create_run_files(info: Any, given: Row) -> Any:
    row = info.context.runs.require(given.get("entity_name") or USER, given["project_name"], given["run_name"])
    wanted = [{"name": name, "upload_url": url(info, row, name)} for name in given["files"]]
    return {"run_id": id_of("Run", row["id"]), "upload_headers": [], "files": wanted}


@mutates(mutation, "markRunFilesUploaded")
def mark_run_files_uploaded(*_: Any) -> Any:
    return {"success": True}
