"""GraphQL to `Artifacts`: versions, their files, the way to them and from them."""

from __future__ import annotations

import base64
import json
import mimetypes
from typing import Any
from urllib.parse import quote

from ariadne import MutationType, ObjectType, QueryType, UnionType

from .artifacts import REGISTRIES
from .database import Refused, Row
from .graph import ORG_ENTITY, USER, connection, id_of, ids, mutates, number_of
from .resolve_collections import as_type

NO_TTL = -2

query, mutation = QueryType(), MutationType()
run, artifact, alias = ObjectType("Run"), ObjectType("Artifact"), ObjectType("ArtifactAlias")
membership, creator = ObjectType("ArtifactCollectionMembership"), UnionType("ArtifactCreator", lambda *_: "Run")
BINDINGS = [query, mutation, run, artifact, alias, membership, creator]

artifact.set_field("id", ids("Artifact"))
artifact.set_field("ttlDurationSeconds", lambda row, _: row["ttl_duration_seconds"] or NO_TTL)
artifact.set_field("ttlIsInherited", lambda row, _: row["ttl_duration_seconds"] is None)
artifact.set_field("tags", lambda row, _: as_tags(row))
artifact.set_field("size", lambda row, info: sum(each["size"] for each in info.context.artifacts.entries(row).values()))
artifact.set_field("fileCount", lambda row, info: len(info.context.artifacts.entries(row)))
artifact.set_field("artifactSequence", lambda row, info: collection_of(row, info))
artifact.set_field("artifactType", lambda row, info: as_type(collection_of(row, info)["type"]))
artifact.set_field("createdBy", lambda row, info: info.context.database.get("runs", row["run_id"]))
alias.set_field("id", ids("ArtifactAlias"))
alias.set_field("artifactCollection", lambda row, info: collection_of(row, info))
membership.set_field("id", ids("ArtifactCollectionMembership"))
membership.set_field("artifactCollection", lambda row, info: collection_of(row, info))
membership.set_field("artifact", lambda row, info: info.context.database.get("artifacts", row["artifact_id"]))


def collection_of(row: Row, info: Any) -> Row:
    found = info.context.database.get("collections", row["collection_id"])
    assert found
    return found


def as_tags(row: Row) -> list[Row]:
    return [{"id": id_of("Tag", name), "name": name} for name in json.loads(row["tags"])]


# Versions


@query.field("artifact")
def artifact_by_id(_: Any, info: Any, id: str) -> Any:  # noqa: A002
    return info.context.database.get("artifacts", number_of(id))


@query.field("clientIDMapping")
def client_id_mapping(_: Any, info: Any, **given: str) -> Any:
    (client_id,) = given.values()
    number = info.context.database.value("SELECT id FROM artifacts WHERE client_id = ?", client_id)
    return {"server_id": id_of("Artifact", number)} if number else None


@artifact.field("aliases")
def aliases(row: Row, info: Any) -> Any:
    return info.context.database.all("SELECT * FROM aliases WHERE artifact_id = ? ORDER BY id", row["id"])


@membership.field("aliases")
def aliases_of_membership(row: Row, info: Any) -> Any:
    return info.context.artifacts.aliases({"id": row["collection_id"]}, {"id": row["artifact_id"]})


@artifact.field("artifactMemberships")
def memberships(row: Row, info: Any) -> Any:
    return connection(info.context.database.all("SELECT * FROM memberships WHERE artifact_id = ?", row["id"]))


@artifact.field("usedBy")
def used_by(row: Row, info: Any) -> Any:
    users = "SELECT runs.* FROM runs JOIN uses ON run_id = runs.id WHERE artifact_id = ?"
    return connection(info.context.database.all(users, row["id"]))


@run.field("outputArtifacts")
def logged(row: Row, info: Any, **page: Any) -> Any:
    found = info.context.database.all(
        "SELECT * FROM artifacts WHERE run_id = ? AND state = 'COMMITTED' ORDER BY id", row["id"]
    )
    return connection(found, **page)


@run.field("inputArtifacts")
def used(row: Row, info: Any, **page: Any) -> Any:
    found = info.context.database.all(
        "SELECT artifacts.* FROM artifacts JOIN uses ON artifact_id = artifacts.id WHERE uses.run_id = ?", row["id"]
    )
    return connection(found, **page)


# Files


@membership.field("files")
def files(row: Row, info: Any, names: list[str] | None = None, **page: Any) -> Any:
    owner = info.context.database.get("artifacts", row["artifact_id"])
    entries = info.context.artifacts.entries(owner)
    kept = [as_file(info, owner, name, entry) for name, entry in entries.items() if not names or name in names]
    return connection(kept, **page)


@artifact.field("filesByManifestEntries")
def files_by_entries(row: Row, info: Any, entries: list[Row] | None = None, **_: Any) -> Any:
    known = info.context.artifacts.entries(row)
    names = [entry["name"] for entry in entries or []] or list(known)
    return connection([as_file(info, row, name, known[name]) for name in names])


def as_file(info: Any, owner: Row, name: str, entry: Row) -> Row:
    """The file of a manifest entry, or of one to be uploaded."""
    where = entry.get("ref")
    if not where:
        md5 = base64.b64decode(entry["digest"]).hex()
        where = f"{info.context.base_url}/storage/artifact/{owner['id']}/{md5}/{quote(name)}"
    known = {"id": id_of("File", f"{owner['id']}/{name}"), "name": name, "display_name": name}
    known |= {"digest": entry["digest"]}
    known |= {"url": where, "direct_url": where, "md5": entry["digest"], "size_bytes": entry.get("size")}
    known |= {"storage_path": f"artifact/{owner['id']}/{name}", "mimetype": mimetypes.guess_type(name)[0]}
    return {**known, "updated_at": owner["updated_at"], "artifact": owner}


def as_manifest(info: Any, owner: Row, number: int) -> Row:
    where = f"{info.context.base_url}/storage/manifest/{owner['id']}"
    file = {"id": id_of("File", f"manifest/{owner['id']}"), "name": "wandb_manifest.json", "direct_url": where}
    return {"id": id_of("ArtifactManifest", number), "file": {**file, "upload_url": where, "upload_headers": []}}


@artifact.field("currentManifest")
def current_manifest(row: Row, info: Any) -> Any:
    number = info.context.database.value("SELECT id FROM manifests WHERE artifact_id = ?", row["id"])
    return as_manifest(info, row, number) if number else None


# The way to a version


@mutates(mutation, "createArtifact")
def create(info: Any, given: Row) -> Any:
    entity, name = given.get("entity_name") or USER, given["project_name"]
    logging = info.context.runs.find(entity, name, given["run_name"]) if given.get("run_name") else None
    return {"artifact": info.context.artifacts.create(given, info.context.project(entity, name, create=True), logging)}


@mutates(mutation, "createArtifactManifest")
def create_manifest(info: Any, given: Row) -> Any:
    if given.get("type") not in (None, "FULL"):
        raise NotImplementedError("incremental artifacts")
    owner = info.context.require("artifacts", given["artifact_id"])
    manifest = info.context.artifacts.add_manifest(owner, given["name"], given["digest"])
    return {"artifact_manifest": as_manifest(info, owner, manifest["id"])}


@mutates(mutation, "updateArtifactManifest")
def update_manifest(info: Any, given: Row) -> Any:
    manifest = info.context.require("manifests", given["artifact_manifest_id"])
    owner = info.context.database.get("artifacts", manifest["artifact_id"])
    info.context.database.update("manifests", manifest["id"], digest=given.get("digest"))
    return {"artifact_manifest": as_manifest(info, owner, manifest["id"])}


@mutates(mutation, "createArtifactFiles")
def create_files(info: Any, given: Row) -> Any:
    """Where to put each file; nowhere for contents that the project has already."""
    answer = []
    for wanted in given["artifact_files"]:
        owner = info.context.require("artifacts", wanted["artifact_id"])
        file = as_file(info, owner, wanted["name"], {"digest": wanted["md5"]})
        stored = info.context.artifacts.blob_of(owner, wanted["md5"]).exists()
        answer.append({**file, "upload_url": None if stored else file["direct_url"], "upload_headers": []})
    return {"files": connection(answer)}


@mutates(mutation, "commitArtifact")
def commit(info: Any, given: Row) -> Any:
    return {"artifact": info.context.artifacts.commit(info.context.require("artifacts", given["artifact_id"]))}


@mutates(mutation, "updateArtifact")
def update(info: Any, given: Row) -> Any:
    row = info.context.require("artifacts", given["artifact_id"])
    values = {name: given[name] for name in ("description", "metadata") if given.get(name) is not None}
    if given.get("ttl_duration_seconds") is not None:
        values["ttl_duration_seconds"] = given["ttl_duration_seconds"] if given["ttl_duration_seconds"] > 0 else None
    added, gone = ([each["tag_name"] for each in given.get(name) or []] for name in ("tags_to_add", "tags_to_delete"))
    values["tags"] = json.dumps([name for name in dict.fromkeys(json.loads(row["tags"]) + added) if name not in gone])
    info.context.database.update("artifacts", row["id"], **values)
    return {"artifact": info.context.database.get("artifacts", row["id"])}


@mutates(mutation, "deleteArtifact")
def delete(info: Any, given: Row) -> Any:
    row = info.context.require("artifacts", given["artifact_id"])
    info.context.artifacts.delete(row, with_aliases=bool(given.get("delete_aliases")))
    return {"artifact": row}


@mutates(mutation, "useArtifact")
def use(info: Any, given: Row) -> Any:
    user = info.context.runs.require(given["entity_name"], given["project_name"], given["run_name"])
    row = info.context.require("artifacts", given["artifact_id"])
    info.context.database.insert("uses", artifact_id=row["id"], run_id=user["id"], used_as=given.get("used_as"))
    return {"artifact": row}


@mutates(mutation, "addAliases")
def add_aliases(info: Any, given: Row) -> Any:
    return change_aliases(info, given, info.context.artifacts.add_aliases)


@mutates(mutation, "deleteAliases")
def delete_aliases(info: Any, given: Row) -> Any:
    return change_aliases(info, given, info.context.artifacts.delete_aliases)


def change_aliases(info: Any, given: Row, change: Any) -> Any:
    row = info.context.require("artifacts", given["artifact_id"])
    for each in given["aliases"]:
        where = info.context.require_project(each["entity_name"], each["project_name"])
        found = info.context.artifacts.collection(where["id"], each["artifact_collection_name"])
        if not found:
            raise Refused(f"collection {each['artifact_collection_name']} not found")
        change(found, row, [each["alias"]])
    return {"success": True}


@mutates(mutation, "linkArtifact")
def link(info: Any, given: Row) -> Any:
    entity, name = given.get("entity_name"), given.get("project_name") or ""
    registry = name.startswith("wandb-registry-")
    if registry and entity != ORG_ENTITY:
        raise Refused(f"registries belong to {ORG_ENTITY}, not to {entity}")
    where = info.context.project(entity, name, create=not registry or name in REGISTRIES)
    if not where:
        raise Refused(f"registry {name} not found")
    if given.get("artifact_id"):
        row = info.context.require("artifacts", given["artifact_id"])
    else:
        row = info.context.database.one("SELECT * FROM artifacts WHERE client_id = ?", given.get("client_id"))
    wanted = [each["alias"] for each in given.get("aliases") or []]
    joined = info.context.artifacts.link(row, where, given["artifact_portfolio_name"], wanted)
    return {"version_index": joined["version_index"], "artifact_membership": joined}


@mutates(mutation, "unlinkArtifact")
def unlink(info: Any, given: Row) -> Any:
    row = info.context.require("artifacts", given["artifact_id"])
    info.context.artifacts.unlink(row, info.context.require("collections", given["artifact_portfolio_id"]))
    return {"success": True}
