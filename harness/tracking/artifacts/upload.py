"""Uploads a staged artifact and verifies it, puts its aliases right, links it, deletes superseded versions."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from harness.errors import DeliveryError
from harness.tracking import client, transfer
from harness.tracking.artifacts.staging import Staged, complete, discard, sync
from harness.tracking.client import one_line, server_answers

TYPE = "model"  # the Trainer's, for all three kinds
DEFAULT_REGISTRY = "wandb-registry-model"
CHECKPOINT_ALIAS = re.compile(r"checkpoint_global_step_\d{1,18}")
OWN_ALIAS = re.compile(rf"epoch_.*|{CHECKPOINT_ALIAS.pattern}")
BATCH_FILES = 200
TRANSFER_TIMEOUT_SECONDS = 60.0  # without bytes moving


def build(staged: Staged) -> Any:
    """Return a wandb.Artifact of the staged files, which it reads: nothing is copied, here or into the cache."""
    import wandb

    complete(staged)
    sync(staged)
    artifact = wandb.Artifact(staged.name, TYPE, description=staged.description, metadata=staged.metadata)
    for name in sorted(staged.files):
        path = str(staged.path_of(name).absolute())
        artifact.add_file(path, name=name, policy="immutable", skip_cache=True)
    return artifact


def deliver(staged: Staged, *, api: Callable[[], Any], log: Callable[[Any, list[str]], Any], may_be_late: bool) -> Any:
    """
    Send it with `log`, which returns the committed artifact, and verify that W&B has what is on the disk.

    One that may be late looks first for newer versions: their aliases stay theirs, and `latest`, which W&B moves
    at every commit, is given back. Raises DeliveryError, and whatever wandb raises.
    """
    artifact = build(staged)
    digest = artifact.digest
    newer = (
        [version for version in versions(api(), staged) if _saved_at(version) > staged.saved_at] if may_be_late else []
    )
    taken = {alias for version in newer for alias in version.aliases}
    committed = log(artifact, [alias for alias in (*staged.aliases, "latest") if alias not in taken])
    found = api().artifact(committed.qualified_name)  # `committed` may hold what was sent, not what has arrived
    if found.digest != digest or client.read_manifest(found).digest() != digest:
        raise DeliveryError(f"what W&B has of {committed.name} differs from what was sent")
    complete(staged)  # it was not changed while it was read
    if newer:
        newest = max(versions(api(), staged), key=lambda version: (_saved_at(version), _index(version)))
        if "latest" not in newest.aliases:
            newest.aliases = [*newest.aliases, "latest"]
            newest.save()
    return committed


def deliver_staged(api: Any, staged: Staged) -> str:
    """
    Upload, unstage and link an artifact of a run that is not open here; returns what to say.

    Raises DeliveryError, and what `deliver` raises.
    """
    from wandb.errors import CommError

    staged = dataclasses.replace(staged, entity=staged.entity or api.default_entity)
    run = f"{staged.entity}/{staged.project}/{staged.run_id}"
    try:
        api.run(run)
    except CommError as error:
        if not server_answers(api.settings["base_url"]):
            raise
        sync = staged.sync_dir or "FOLDER OF THE RUN"
        raise DeliveryError(f"W&B has no run {run}; send it first: harness sync {sync}") from error
    log = partial(save_without_run, api, staged)
    committed = deliver(staged, api=lambda: api, log=log, may_be_late=True)
    discard(staged)
    name = f"{staged.entity}/{staged.project}/{committed.name}"
    if staged.registry is None:
        return f"{name} delivered ({', '.join(staged.aliases)})"
    try:
        committed.link(registry_path(staged.registry), staged.aliases)
    except Exception as error:  # wandb and its transports raise many types
        command = link_command(name, staged.registry, staged.aliases)
        raise DeliveryError(f"{name} is, but not linked: {one_line(error)}; link it: {command}") from error
    return f"{name} delivered and linked to {registry_path(staged.registry)}"


def versions(api: Any, staged: Staged) -> list[Any]:
    """Return the committed versions of its collection, none where it doesn't exist yet."""
    return versions_of(api, f"{staged.entity}/{staged.project}/{staged.name}", TYPE)


def versions_of(api: Any, path: str, kind: str) -> list[Any]:
    """Return the committed versions of a collection ENTITY/PROJECT/NAME of a type, none where it doesn't exist yet."""
    return list(api.artifacts(kind, path)) if api.artifact_collection_exists(path, kind) else []


def delete_superseded(api: Any, staged: Staged, keep: int) -> list[str]:
    """
    Delete this run's checkpoints in the collection beyond the newest `keep`; returns the versions deleted.

    One with an alias that isn't ours (`best`, `latest`, the user's own) stays, as does another run's.
    """
    own = [version for version in versions(api, staged) if version.metadata.get("run_id") == staged.run_id]
    own = [version for version in own if not {"initial_model", "final_model"} & version.metadata.keys()]
    own.sort(key=lambda version: (_saved_at(version), _index(version)), reverse=True)
    deleted = []
    for version in own[keep:]:
        if not all(OWN_ALIAS.fullmatch(alias) for alias in version.aliases):
            continue
        maker = version.logged_by()
        if maker is not None and maker.id == staged.run_id:
            name = version.name
            version.delete(delete_aliases=True)
            deleted.append(name)
    return deleted


def is_checkpoint(staged: Staged) -> bool:
    """Whether it is a checkpoint, whatever its collection is called."""
    return any(CHECKPOINT_ALIAS.fullmatch(alias) for alias in staged.aliases)


def registry_path(name: str) -> str:
    """Return the path of a registered model: NAME is in W&B's model registry, a name with a slash is a full path."""
    return name if "/" in name else f"{DEFAULT_REGISTRY}/{name}"


def link_command(artifact: str, registry: str, aliases: Sequence[str]) -> str:
    """The command that links an artifact later."""
    options = "".join(f" --alias {alias}" for alias in aliases)
    return f"harness link {artifact} --registry {registry}{options}"


def save_without_run(api: Any, staged: Staged, artifact: Any, aliases: Sequence[str]) -> Any:
    """
    Log an artifact as the output of its run without opening the run: its state and history stay as they are.

    The steps are those of wandb-core. `aliases` are given as they are: `latest` is for the caller to ask for. Files
    go in one request each, which S3 limits to 5 GB. Raises what wandb and urllib raise.
    """
    ask = partial(client.execute, api)
    own = {"entityName": staged.entity, "projectName": staged.project, "runName": staged.run_id}
    given = {
        **own,
        "artifactTypeName": TYPE,
        "artifactCollectionName": staged.name,
        "digest": artifact.digest,
        "digestAlgorithm": "MANIFEST_MD5",
        "description": artifact.description,
        "metadata": json.dumps(artifact.metadata),
        "aliases": [{"artifactCollectionName": staged.name, "alias": alias} for alias in aliases],
        "enableDigestDeduplication": True,
        "clientID": uuid.uuid4().hex,
        "sequenceClientID": uuid.uuid4().hex,
    }
    created = ask(client.CREATE_ARTIFACT, {"input": given})["createArtifact"]["artifact"]
    if created["state"] != "COMMITTED":  # else W&B had it already, and has moved the aliases
        base = (created["artifactSequence"].get("latestArtifact") or {}).get("id")
        manifest = {
            **own,
            "artifactID": created["id"],
            "baseArtifactID": base,
            "name": "wandb_manifest.json",
            "manifestType": "FULL",
        }
        begun = ask(client.CREATE_MANIFEST, {**manifest, "digest": "", "includeUpload": False})
        content = artifact.manifest.to_manifest_json()
        manifest_id = begun["createArtifactManifest"]["artifactManifest"]["id"]
        for name, birth in _send_files(ask, staged, artifact, created["id"], manifest_id):
            content["contents"][name]["birthArtifactID"] = birth
        body = json.dumps(content).encode()
        digest = base64.b64encode(hashlib.md5(body).digest()).decode()  # noqa: S324 - the protocol's
        ended = ask(client.CREATE_MANIFEST, {**manifest, "digest": digest, "includeUpload": True})
        file = ended["createArtifactManifest"]["artifactManifest"]["file"]
        _put(file["uploadUrl"], file["uploadHeaders"], body, len(body))
        ask(client.COMMIT_ARTIFACT, {"artifactID": created["id"]})
    found = [version for version in versions(api, staged) if version.digest == artifact.digest]
    if not found:
        raise DeliveryError(f"W&B does not show {staged.name} after its commit")
    return found[0]


def _send_files(
    ask: Any, staged: Staged, artifact: Any, artifact_id: str, manifest_id: str
) -> Iterator[tuple[str, str]]:
    """Upload what W&B doesn't have yet. Yields each file's name and the artifact that its content came with."""
    entries = list(artifact.manifest.entries.items())
    for start in range(0, len(entries), BATCH_FILES):
        batch = entries[start : start + BATCH_FILES]
        specs = [
            {"artifactID": artifact_id, "name": name, "md5": entry.digest, "artifactManifestID": manifest_id}
            for name, entry in batch
        ]
        answer = ask(client.CREATE_FILES, {"artifactFiles": specs, "storageLayout": "V2"})
        for (name, entry), edge in zip(batch, answer["createArtifactFiles"]["files"]["edges"], strict=True):
            node = edge["node"]
            if node["uploadUrl"] is not None:
                with staged.path_of(name).open("rb") as file:
                    _put(node["uploadUrl"], node["uploadHeaders"], file, entry.size)
            yield name, node["artifact"]["id"]


def _put(url: str, headers: Sequence[str], body: Any, size: int) -> None:
    given = {name: value for name, _, value in (header.partition(":") for header in headers)}
    transfer.send(url, body, size=size, patience=TRANSFER_TIMEOUT_SECONDS, headers=given)


def _saved_at(version: Any) -> float:
    saved_at = version.metadata.get("saved_at")
    return float(saved_at) if isinstance(saved_at, int | float) else 0.0


def _index(version: Any) -> int:
    return int(version.version.removeprefix("v"))
