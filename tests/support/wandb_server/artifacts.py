"""What happens to artifacts: created, filled, committed as a version, aliased, linked, used, deleted."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .database import Database, Refused, Row, now

REGISTRIES = ("wandb-registry-model", "wandb-registry-dataset")


class Artifacts:
    """Collections (sequences hold what runs logged, portfolios hold links), versions and their files."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # Collections

    def collection(self, project_id: int, name: str) -> Row | None:
        return self._database.one("SELECT * FROM collections WHERE project_id = ? AND name = ?", project_id, name)

    def _require_collection(self, project: Row, name: str, kind: str, type_: str) -> Row:
        found = self.collection(project["id"], name)
        if not found:
            values = {"project_id": project["id"], "name": name, "kind": kind, "type": type_, "created_at": now()}
            found = self._database.get("collections", self._database.insert("collections", **values))
        assert found
        if (found["kind"], found["type"]) != (kind, type_):
            raise Refused(f"collection {name} is a {found['kind']} of type {found['type']}, not a {kind} of {type_}")
        return found

    def membership(self, collection: Row, alias: str) -> Row | None:
        """The version with this alias; v0, v1 ... are aliases of every version."""
        if alias[:1] == "v" and alias[1:].isdigit():
            where, value = "version_index = ?", int(alias[1:])
        else:
            having = "SELECT artifact_id FROM aliases WHERE collection_id = m.collection_id AND alias = ?"
            where, value = f"artifact_id = ({having})", alias
        return self._database.one(
            f"SELECT * FROM memberships m WHERE collection_id = ? AND {where}",  # noqa: S608 - one of the two above
            *(collection["id"], value),
        )

    def named(self, project: Row, name: str) -> Row | None:
        """The membership called COLLECTION:ALIAS, latest without one."""
        collection_name, _, alias = name.partition(":")
        collection = self.collection(project["id"], collection_name)
        return self.membership(collection, alias or "latest") if collection else None

    # The way to a version

    def create(self, given: Mapping[str, Any], project: Row, run: Row | None) -> Row:
        """A new PENDING artifact; the same one for a retry; the COMMITTED one that has this content already."""
        name = given.get("artifact_collection_name") or given["artifact_collection_names"][0]
        collection = self._require_collection(project, name, "sequence", given["artifact_type_name"])
        aliases = [alias["alias"] for alias in given.get("aliases") or []]
        found = self._same(collection, given)
        if found:
            if found["state"] == "COMMITTED":
                self.add_aliases(collection, found, aliases)
            return found
        values = {
            "collection_id": collection["id"],
            "run_id": run["id"] if run else None,
            "digest_algorithm": given.get("digest_algorithm") or "MANIFEST_MD5",
            "state": "PENDING",
            "tags": json.dumps([tag["tag_name"] for tag in given.get("tags") or []]),
            "wanted_aliases": json.dumps(aliases),
            "created_at": now(),
            **{
                name: given.get(name)
                for name in ("client_id", "digest", "description", "metadata", "ttl_duration_seconds", "history_step")
            },
        }
        created = self._database.get("artifacts", self._database.insert("artifacts", **values))
        assert created
        return created

    def _same(self, collection: Row, given: Mapping[str, Any]) -> Row | None:
        in_collection = "SELECT * FROM artifacts WHERE collection_id = ? AND"
        if given.get("client_id"):
            retried = self._database.one(
                f"{in_collection} client_id = ? AND state != 'DELETED'", collection["id"], given["client_id"]
            )
            if retried:
                return retried
        if not given.get("enable_digest_deduplication"):
            return None
        return self._database.one(
            f"{in_collection} digest = ? AND state = 'COMMITTED'", collection["id"], given["digest"]
        )

    def add_manifest(self, artifact: Row, name: str, digest: str) -> Row:
        old = self._database.value("SELECT id FROM manifests WHERE artifact_id = ?", artifact["id"])
        if old is None:
            old = self._database.insert("manifests", artifact_id=artifact["id"])
        self._database.update("manifests", old, name=name, digest=digest)
        manifest = self._database.get("manifests", old)
        assert manifest
        return manifest

    def commit(self, artifact: Row) -> Row:
        """Make a version of it. Raises Refused where contents are missing."""
        if artifact["state"] != "PENDING":
            return artifact
        missing = [path for path, entry in self.entries(artifact).items() if not self._stored(artifact, entry)]
        if missing or not self.manifest_path(artifact).exists():
            raise Refused(f"cannot commit: not uploaded: {', '.join(missing) or 'the manifest'}")
        collection = self._database.get("collections", artifact["collection_id"])
        assert collection
        version = self.join(collection, artifact)["version_index"]
        self._database.update("artifacts", artifact["id"], state="COMMITTED", version_index=version, updated_at=now())
        self.add_aliases(collection, artifact, json.loads(artifact["wanted_aliases"]))
        committed = self._database.get("artifacts", artifact["id"])
        assert committed
        return committed

    def join(self, collection: Row, artifact: Row) -> Row:
        """Make the artifact a version of the collection, if it isn't yet."""
        where = "collection_id = ? AND artifact_id = ?"
        found = self._database.one(f"SELECT * FROM memberships WHERE {where}", collection["id"], artifact["id"])  # noqa: S608
        if found:
            return found
        # Of deleted versions too: a number is not given twice.
        last = self._database.value(
            "SELECT MAX(version_index) FROM (SELECT version_index FROM memberships WHERE collection_id = ?"
            " UNION SELECT version_index FROM artifacts WHERE collection_id = ?)",
            *(collection["id"], collection["id"]),
        )
        values = {"collection_id": collection["id"], "artifact_id": artifact["id"], "created_at": now()}
        number = self._database.insert("memberships", version_index=0 if last is None else last + 1, **values)
        self._database.update("collections", collection["id"], updated_at=now())
        joined = self._database.get("memberships", number)
        assert joined
        return joined

    # Files

    def blob(self, project_id: int, md5: str) -> Path:
        """Where content is kept, once a project. `md5` is base64, as manifests have it, or hex."""
        hexadecimal = md5 if len(md5) == 32 else base64.b64decode(md5).hex()
        return self._database.folder / "blobs" / str(project_id) / hexadecimal

    def blob_of(self, artifact: Row, md5: str) -> Path:
        collection = self._database.get("collections", artifact["collection_id"])
        assert collection
        return self.blob(collection["project_id"], md5)

    def manifest_path(self, artifact: Row) -> Path:
        return self._database.folder / "manifests" / f"{artifact['id']}.json"

    def entries(self, artifact: Row) -> dict[str, Row]:
        """The manifest's files by path; references have a `ref`."""
        path = self.manifest_path(artifact)
        return json.loads(path.read_text(encoding="utf-8"))["contents"] if path.exists() else {}

    def _stored(self, artifact: Row, entry: Row) -> bool:
        return bool(entry.get("ref")) or self.blob_of(artifact, entry["digest"]).exists()

    # Aliases, links, ends

    def aliases(self, collection: Row, artifact: Row) -> list[Row]:
        return self._database.all(
            "SELECT * FROM aliases WHERE collection_id = ? AND artifact_id = ? ORDER BY id",
            *(collection["id"], artifact["id"]),
        )

    def add_aliases(self, collection: Row, artifact: Row, aliases: Iterable[str]) -> None:
        """Give the version these aliases; whichever version of the collection had one loses it."""
        for alias in aliases:
            self._database.insert("aliases", collection_id=collection["id"], artifact_id=artifact["id"], alias=alias)

    def delete_aliases(self, collection: Row, artifact: Row, aliases: Iterable[str]) -> None:
        for alias in aliases:
            self._database.delete("aliases", collection_id=collection["id"], artifact_id=artifact["id"], alias=alias)

    def link(self, artifact: Row, project: Row, name: str, aliases: Iterable[str]) -> Row:
        """Make it a version of a portfolio. `latest` follows what was linked last."""
        if artifact["state"] != "COMMITTED":
            raise Refused("only a committed artifact can be linked")
        source = self._database.get("collections", artifact["collection_id"])
        assert source
        portfolio = self._require_collection(project, name, "portfolio", source["type"])
        joined = self.join(portfolio, artifact)
        self.add_aliases(portfolio, artifact, ["latest", *aliases])
        return joined

    def unlink(self, artifact: Row, portfolio: Row) -> None:
        for table in ("aliases", "memberships"):
            self._database.delete(table, collection_id=portfolio["id"], artifact_id=artifact["id"])

    def delete(self, artifact: Row, *, with_aliases: bool) -> None:
        """Remove a version and its links; the contents stay, other versions may share them."""
        aliases = self._database.all("SELECT alias FROM aliases WHERE artifact_id = ?", artifact["id"])
        if aliases and not with_aliases:
            raise Refused(f"cannot delete an artifact with aliases: {', '.join(row['alias'] for row in aliases)}")
        for table in ("aliases", "memberships"):
            self._database.delete(table, artifact_id=artifact["id"])
        self._database.update("artifacts", artifact["id"], state="DELETED", updated_at=now())
