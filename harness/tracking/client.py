"""
What we use of wandb beyond its public interface: credentials, questions to the server, its errors, parts of its runs.

Only `rows/wandb_file.py` beside it knows wandb from inside: a new version of wandb is checked against these two files.
Nothing here prompts.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

from harness.errors import UnreachableError
from harness.masking import masked
from harness.tracking import transfer
from harness.tracking.damage import load_json

API_TIMEOUT_SECONDS = 30
PROBE_TIMEOUT_SECONDS = 4
COUNT_TIMEOUT_SECONDS = 10
STOP_TIMEOUT_SECONDS = 5  # an agent kills 30 s after its signal
MANIFEST_TIMEOUT_SECONDS = 60
FILES_OF_A_PAGE = 1000

ROWS_OF_RUN = """
query RunRows($entity: String, $project: String, $run: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $run, missingOk: true) { historyLineCount historyTail summaryMetrics state }
  }
}"""
CANCELLED = ("CANCELED", "CANCELLED")
# A sweep that is cancelled has its runs ended by their agents.
STOP_OF_RUN = """
query RunOfSweepStopped($entity: String, $project: String, $run: String!, $sweep: String!) {
  project(name: $project, entityName: $entity) {
    run(name: $run) { stopped shouldStop }
    sweep(sweepName: $sweep) { state }
  }
}"""
MANIFEST_OF_ARTIFACT = """
query ArtifactManifest($id: ID!) { artifact(id: $id) { currentManifest { file { directUrl } } } }"""
# As wandb.Api asked it before it read files of W&B's: `end` is behind the last step.
HISTORY_OF_RUN = """
query HistoryPage($entity: String!, $project: String!, $run: String!, $first: Int64!, $end: Int64!, $count: Int!) {
  project(name: $project, entityName: $entity) {
    run(name: $run) { history(minStep: $first, maxStep: $end, samples: $count) }
  }
}"""
# What the client says when it opens a run: after it the server takes the run for a running one.
REOPEN_RUN = """
mutation UpsertBucket($entity: String, $project: String, $name: String!) {
  upsertBucket(input: {entityName: $entity, modelName: $project, name: $name}) { bucket { id } }
}"""
# As wandb-core has them (core/api/graphql in wandb's repository).
CREATE_ARTIFACT = """
mutation CreateArtifact($input: CreateArtifactInput!) {
    createArtifact(input: $input) { artifact { id state artifactSequence { latestArtifact { id } } } }
}"""
CREATE_MANIFEST = """
mutation CreateArtifactManifest(
    $artifactID: ID!, $baseArtifactID: ID, $name: String!, $digest: String!, $entityName: String!,
    $projectName: String!, $runName: String!, $manifestType: ArtifactManifestType!, $includeUpload: Boolean!
) {
    createArtifactManifest(input: {
        artifactID: $artifactID, baseArtifactID: $baseArtifactID, name: $name, digest: $digest,
        entityName: $entityName, projectName: $projectName, runName: $runName, type: $manifestType
    }) {
        artifactManifest {
            id
            file { id uploadUrl @include(if: $includeUpload) uploadHeaders @include(if: $includeUpload) }
        }
    }
}"""
CREATE_FILES = """
mutation CreateArtifactFiles($artifactFiles: [CreateArtifactFileSpecInput!]!, $storageLayout: ArtifactStorageLayout!) {
    createArtifactFiles(input: { artifactFiles: $artifactFiles, storageLayout: $storageLayout }) {
        files { edges { node { storagePath uploadUrl uploadHeaders artifact { id } } } }
    }
}"""
COMMIT_ARTIFACT = """
mutation CommitArtifact($artifactID: ID!) {
    commitArtifact(input: { artifactID: $artifactID }) { artifact { id digest } }
}"""


def import_ahead() -> None:
    """
    Import what opening a run imports, if wandb is there: before other libraries, in a process that has few modules yet.

    `wandb.init` imports the public API too, which looks through all modules for the texts of each of its classes.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("wandb.apis.public")


# Errors


def failures() -> tuple[type[Exception], ...]:
    """What wandb raises when its server, its service process or the disk fails."""
    import wandb
    from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

    return (wandb.Error, OSError, *_mailbox_errors(), ServerResponseError)


def is_run_gone(error: BaseException) -> bool:
    """Whether wandb's process is gone or the run is over, also where wandb has wrapped it."""
    from wandb.errors import UsageError

    if isinstance(error, UsageError | ConnectionResetError | BrokenPipeError):
        return True
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _mailbox_errors()):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _mailbox_errors() -> tuple[type[Exception], ...]:
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    return (HandleAbandonedError, MailboxClosedError)


def one_line(error: Exception) -> str:
    """An error as a short line."""
    text = " ".join(masked(str(error)).split()) or "no message"  # masked as a whole: a part has another form
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + ' ...'}"


def installed() -> str:
    """The version of wandb."""
    import wandb

    return str(wandb.__version__)


# Credentials and the server


def has_credentials(settings: Any = None) -> bool:
    """Whether there is a key in the environment or a login; of these settings, or of the process."""
    import wandb

    return _credentials(wandb.setup().settings if settings is None else settings, "wandb.init()") is not None


def server_answers(base_url: str, *, timeout: float = PROBE_TIMEOUT_SECONDS) -> bool:
    """Whether the server takes requests now: anything but silence, a refused connection or an error of its own."""
    return why_silent(base_url, timeout=timeout) is None


def why_silent(base_url: str, *, timeout: float = PROBE_TIMEOUT_SECONDS) -> str | None:
    """Why the server does not take requests now, in a few words; None if it does."""
    try:
        status = transfer.ask("GET", base_url, seconds=timeout, is_read=False).status
    except requests.exceptions.SSLError:
        return None  # it is there; wandb has its own ideas of certificates
    except requests.RequestException as error:
        return f"{base_url}: {type(error).__name__}"
    return f"{base_url} answers {status}" if status >= 500 else None


def open_api(source: str, *, silent: bool = False) -> Any:
    """
    The `wandb.Api` of the user; `source` is who asks. `silent` holds for all that this process does with wandb.

    Raises UnreachableError without credentials or server.
    """
    import wandb

    settings = (wandb.setup(wandb.Settings(silent=True)) if silent else wandb.setup()).settings
    if _credentials(settings, source) is None:
        raise UnreachableError("No W&B credentials found: run `wandb login`, or set WANDB_API_KEY.")
    if not server_answers(settings.base_url):
        raise UnreachableError(f"W&B can't be reached at {settings.base_url}.")
    try:
        return wandb.Api(timeout=API_TIMEOUT_SECONDS)
    except wandb.Error as error:
        raise UnreachableError(f"W&B does not take the credentials, or does not answer: {one_line(error)}.") from error


def _credentials(settings: Any, source: str) -> Any:
    """The key, or what a login has left; None without either."""
    from wandb.sdk.lib.wbauth import HostUrl, authenticate_session

    if settings.api_key:
        return settings.api_key
    # Not wandb.login(prompt=False): it asks the server for the user's name: seconds if out of reach.
    host = HostUrl(settings.base_url, app_url=settings.app_url)
    return authenticate_session(host=host, source=source, prompt=False, update_session=False)


# Questions


def execute(api: Any, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a question of ours, asked as `wandb.Api` asks its own. Raises what it raises."""
    answer: dict[str, Any] = api._service_api.execute_graphql(query, dict(variables))
    return answer


def ask_once(
    settings: Any, query: str, variables: Mapping[str, Any], *, seconds: float | None = None
) -> dict[str, Any]:
    """
    The answer to a question asked without wandb's process and its retries, with the settings of a run.

    Raises requests.RequestException, and ValueError, KeyError or TypeError for what is no answer.
    """
    found = _credentials(settings, "harness")
    key = found if isinstance(found, str) else getattr(found, "api_key", "")
    answer = transfer.ask(
        "POST",
        f"{settings.base_url}/graphql",
        seconds=COUNT_TIMEOUT_SECONDS if seconds is None else seconds,
        json={"query": query, "variables": dict(variables)},
        auth=("api", str(key)),
    )
    answer.check()
    data: dict[str, Any] = load_json(answer.body)["data"]
    return data


def is_stopped(settings: Any) -> bool:
    """Whether somebody, or the search, has stopped the run of a sweep, or cancelled the sweep; False: W&B is silent."""
    variables = {
        "entity": settings.entity,
        "project": settings.project,
        "run": settings.run_id,
        "sweep": settings.sweep_id,
    }
    try:
        found = ask_once(settings, STOP_OF_RUN, variables, seconds=STOP_TIMEOUT_SECONDS)["project"]
        run, sweep = found["run"], found["sweep"] or {}
        return bool(run["stopped"] or run["shouldStop"] or str(sweep.get("state")).upper() in CANCELLED)
    except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError):
        return False


# Runs and files


def new_run_id() -> str:
    """An id for a run, as wandb makes them."""
    from wandb.sdk.lib.runid import generate_id

    return str(generate_id())


def forget_run() -> None:
    """Let this process, which was forked from one with an open run, have none, and no part in that one's process."""
    from wandb.env import SERVICE
    from wandb.sdk.lib.module import unset_globals

    unset_globals()
    os.environ.pop(SERVICE, None)


def next_step(run: Any, default: int) -> int:
    """The step that the open run gives to its next row, counted from its opening; rows of the user's own count too."""
    return int(getattr(run, "_local_step", default))  # the public `step` asks wandb's process, which says 0 on a resume


def bytes_sent(run: Any, timeout: float) -> int | None:
    """How much wandb has handed to the network, as its own progress display asks for it; None if unknown."""
    try:
        response = run._interface.deliver_poll_exit().wait_or(timeout=timeout)
        return int(response.response.poll_exit_response.pusher_stats.uploaded_bytes)
    except Exception:  # nothing depends on it, whatever becomes of it
        return None


def read_manifest(artifact: Any) -> Any:
    """
    Return the manifest of a version. wandb's own function waits for as long as the server likes.

    Raises requests.RequestException, what wandb raises, and ValueError for what is no manifest.
    """
    if artifact._manifest is None:
        from wandb.sdk.artifacts.artifact_manifest import ArtifactManifest

        answer = artifact._service_api.execute_graphql(MANIFEST_OF_ARTIFACT, {"id": artifact.id})
        try:
            url = answer["artifact"]["currentManifest"]["file"]["directUrl"]
        except (KeyError, TypeError) as error:
            raise ValueError("W&B has no manifest of it") from error
        found = transfer.ask("GET", url, seconds=MANIFEST_TIMEOUT_SECONDS, headers=_extra_headers())
        found.check()
        try:
            content = load_json(found.body)
            artifact._manifest = ArtifactManifest.from_manifest_json(content, artifact.digest_algorithm)
        except Exception as error:  # pydantic's, and whatever a value of another type leads to
            raise ValueError(f"its manifest can't be read: {one_line(error)}") from error
    return artifact._manifest


def addresses_of(artifact: Any, names: Sequence[str]) -> dict[str, str]:
    """Return where the files of a version can be had now, by name. Raises what wandb raises."""
    files = artifact.files(names=list(names), per_page=FILES_OF_A_PAGE)
    return {str(file.name): str(file.direct_url) for file in files}


def fetch(url: str, place: Path, *, size: int, patience: float) -> None:
    """Stream a file of W&B's of at most `size` bytes to a place. Raises requests.RequestException and OSError."""
    with place.open("wb") as file:
        transfer.receive(url, file.write, size=size, patience=patience, headers=_extra_headers())


def _extra_headers() -> dict[str, str]:
    """The headers that the user's settings of wandb ask for."""
    import wandb

    return dict(wandb.setup().settings.x_extra_http_headers or {})


def has_content_of(file: Path, entry: Any) -> bool:
    """Whether a file on the disk has the size and the digest that an artifact's manifest has of it. Reads it."""
    from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactDigestAlgorithm
    from wandb.sdk.lib.hashutil import md5_file_b64, xxh128_file_b64

    if not file.is_file() or (entry.size is not None and file.stat().st_size != entry.size):
        return False
    is_xxh128 = entry.digest_algorithm() is ArtifactDigestAlgorithm.MANIFEST_XXH128
    return bool((xxh128_file_b64 if is_xxh128 else md5_file_b64)(file) == entry.digest)


def separate_randomness() -> None:
    """
    Give wandb's threads a generator of their own. Twice changes nothing.

    They draw from `random`, in the process that trains, whenever wandb reports on itself (about once a minute) and
    whenever a request has failed. What a collator draws, and what a resume goes on with, would depend on the clock.
    """
    import wandb.sdk.lib.retry

    modules: list[Any] = [wandb.sdk.lib.retry]
    with contextlib.suppress(ImportError):
        modules.append(importlib.import_module("opentelemetry.exporter.otlp.common.http"))
    for module in modules:
        if getattr(module, "random", None) is random:
            module.random = random.Random()
