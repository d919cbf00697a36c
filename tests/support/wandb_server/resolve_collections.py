"""GraphQL to `Artifacts`: types and collections of artifacts."""

from __future__ import annotations

import json
from typing import Any

from ariadne import InterfaceType, ObjectType, QueryType

from .database import Row
from .graph import connection, id_of, ids, matches, number_of

query, project, artifact_type = QueryType(), ObjectType("Project"), ObjectType("ArtifactType")
sequence, portfolio = ObjectType("ArtifactSequence"), ObjectType("ArtifactPortfolio")
collection_type = InterfaceType("ArtifactCollection", lambda row, *_: f"Artifact{row['kind'].title()}")
BINDINGS = [query, project, artifact_type, sequence, portfolio, collection_type]


def as_type(name: str) -> Row:
    return {"id": id_of("ArtifactType", name), "name": name}


for kind in (sequence, portfolio):
    kind.set_field("id", ids("ArtifactCollection"))
    kind.set_field("state", lambda *_: "READY")
    kind.set_field("project", lambda row, info: info.context.database.get("projects", row["project_id"]))
    kind.set_field("defaultArtifactType", lambda row, _: as_type(row["type"]))
    kind.set_field("tags", lambda *_: {"edges": []})
    kind.set_field(
        "artifactMembership", lambda row, info, alias_name: info.context.artifacts.membership(row, alias_name)
    )


@sequence.field("aliases")
@portfolio.field("aliases")
def aliases_of_collection(row: Row, info: Any, **page: Any) -> Any:
    found = info.context.database.all("SELECT * FROM aliases WHERE collection_id = ? ORDER BY id", row["id"])
    return connection(found, **page)


@sequence.field("artifacts")
@portfolio.field("artifacts")
def versions(row: Row, info: Any, filters: str | None = None, order: str | None = None, **page: Any) -> Any:
    """Newest first, as W&B orders them."""
    found = info.context.database.all(
        "SELECT artifacts.*, memberships.version_index AS version FROM artifacts JOIN memberships"
        " ON artifact_id = artifacts.id WHERE memberships.collection_id = ? ORDER BY memberships.version_index DESC",
        row["id"],
    )
    kept = [each for each in found if matches(json.loads(filters or "{}"), each)]
    answer = connection(kept[::-1] if (order or "").startswith("+") else kept, **page)
    for edge in answer["edges"]:
        edge["version"] = f"v{edge['node']['version']}"
    return answer


@sequence.field("latestArtifact")
def latest(row: Row, info: Any) -> Any:
    return info.context.database.one(
        "SELECT * FROM artifacts WHERE collection_id = ? AND state = 'COMMITTED' ORDER BY version_index DESC LIMIT 1",
        row["id"],
    )


@sequence.field("digestAlgorithm")
def digest_algorithm(row: Row, info: Any) -> Any:
    newest = latest(row, info)
    return newest["digest_algorithm"] if newest else None


def types_of(row: Row, info: Any) -> list[Row]:
    found = info.context.database.all(
        "SELECT type, MIN(created_at) AS created_at FROM collections WHERE project_id = ? GROUP BY type", row["id"]
    )
    return [{**as_type(each["type"]), "project_id": row["id"], "created_at": each["created_at"]} for each in found]


@project.field("artifactType")
def type_named(row: Row, info: Any, name: str) -> Any:
    return next((each for each in types_of(row, info) if each["name"] == name), None)


@project.field("artifactTypes")
def types(row: Row, info: Any, include_all: bool = False, **page: Any) -> Any:
    return connection(types_of(row, info), **page)


@project.field("artifactCollection")
def collection_named(row: Row, info: Any, name: str) -> Any:
    return info.context.artifacts.collection(row["id"], name)


@artifact_type.field("artifactCollection")
def collection_of_type(row: Row, info: Any, name: str) -> Any:
    found = info.context.artifacts.collection(row["project_id"], name)
    return found if found and found["type"] == row["name"] else None


@project.field("artifactCollections")
@artifact_type.field("artifactCollections")
def collections(row: Row, info: Any, filters: str | None = None, order: str | None = None, **page: Any) -> Any:
    project_id = row.get("project_id", row["id"])
    found = info.context.database.all("SELECT * FROM collections WHERE project_id = ? ORDER BY id", project_id)
    of_type = [each for each in found if "project_id" not in row or each["type"] == row["name"]]
    return connection([each for each in of_type if matches(json.loads(filters or "{}"), each)], **page)


@project.field("artifactCollectionMembership")
def membership_named(row: Row, info: Any, name: str) -> Any:
    return info.context.artifacts.named(row, name)


@project.field("artifact")
def artifact_named(row: Row, info: Any, name: str) -> Any:
    found = info.context.artifacts.named(row, name)
    return info.context.database.get("artifacts", found["artifact_id"]) if found else None


@query.field("artifactCollection")
def collection_by_id(_: Any, info: Any, id: str) -> Any:  # noqa: A002 - the field's name
    return info.context.database.get("collections", number_of(id))
