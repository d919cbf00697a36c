"""Artifacts that a server, or somebody else, gives another form than ours: refused in a line, in time, in bounds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.wandb import artifact_processes as processes
from tests.support.wandb_server import WandbServer

pytestmark = pytest.mark.slow

Process = subprocess.Popen[str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def downloads(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A process that downloads, and has logged artifacts `one`, `two` of two files."""
    folder = tmp_path_factory.mktemp("downloads")
    content = folder / "content"
    (content / "below").mkdir(parents=True)
    (content / "small").write_text("small", encoding="utf-8")
    (content / "below" / "large").write_bytes(bytes(range(256)) * 4000)
    process = processes.start("-m", "tests.support.wandb.artifact_downloads", folder=folder, server=server)
    try:
        told(process, log=["one", "two"], folder=str(content))
        yield process
    finally:
        processes.ended(process)


def told(process: Process, **case: Any) -> dict[str, Any]:
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(case) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    found: dict[str, Any] = json.loads(line)
    return found


def manifest_of(server: WandbServer, name: str) -> Path:
    paths = sorted((server.folder / "manifests").glob("*.json"), key=lambda path: int(path.stem))
    names = [artifact.collection for artifact in server.artifacts()]
    return dict(zip(names, paths, strict=True))[name]


def with_entries(content: dict[str, Any], entries: dict[str, Any]) -> str:
    of_small = {name: content["contents"]["small"][name] for name in ("digest", "size")}
    return json.dumps({**content, "contents": {name: {**of_small, **each} for name, each in entries.items()}})


REFUSED: dict[str, tuple[Any, str]] = {
    "missing": (None, "answers 404"),
    "a folder's name": ({"a": {}, "a/b": {}}, "a in it is a file, and the folder of a/b"),
    "twice": ({"a": {}, "./a": {}}, "./a and a in it would be one file"),
    "capitals": ({"Config.json": {}, "config.json": {}}, "would be one file"),
    "file": ({"a": {"ref": "file:///etc/passwd"}}, "a in it is a reference to file:///etc/passwd"),
    "outside": ({"../a": {}}, "it names a file outside its folder, '../a'"),
    "absolute": ({"/a": {}}, "it names a file outside its folder"),
    "control": ({"a\n\0": {}}, "it names a file outside its folder"),
    "no size": ({"a": {"size": None}}, "does not say how large a in it is"),
    "negative": ({"a": {"size": -1}}, "its manifest can't be read"),
    "types": ({"a": {"digest": 5}}, "its manifest can't be read"),
    "list": ("[1]", "its manifest can't be read"),
    "null": ('{"version": 1, "contents": null}', "its manifest can't be read"),
    "newer": ('{"version": 2}', "its manifest can't be read: ValueError: Invalid manifest version"),
    "nested": ("[" * 10_000, "it is nested too deep"),
    "NULs": ("\0\0{}", "its manifest can't be read"),
    "cut": ('{"version": 1, "contents": {', "its manifest can't be read"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_manifest_of_another_form_is_refused_in_a_line(what: str, server: WandbServer, downloads: Process) -> None:
    given, message = REFUSED[what]
    path = manifest_of(server, "one")
    before, served = path.read_text(encoding="utf-8"), path.with_name(f"{path.name}.served")
    try:
        if given is None:
            path.unlink()
        else:
            text = given if isinstance(given, str) else with_entries(json.loads(before), given)
            served.write_text(text, encoding="utf-8")
        found = told(downloads, name="one")
    finally:
        path.write_text(before, encoding="utf-8")
        served.unlink(missing_ok=True)
    assert message in found["error"]
    assert "\n" not in found["error"]
    assert len(found["error"]) < 700


@pytest.mark.parametrize("kind", ["drip", "endless"])
@pytest.mark.parametrize("match", ["get manifest", "get artifact/below"])
def test_a_download_without_an_end_is_given_up(
    kind: str, match: str, server: WandbServer, downloads: Process, tmp_path: Path
) -> None:
    peak = told(downloads, name="two")["peak_mib"]
    server.fault(kind, match)
    try:
        found = told(downloads, name="two", folder=str(tmp_path / "two"))
    finally:
        server.clear_faults()
    assert "error" in found
    assert found["seconds"] < 40
    assert found["peak_mib"] - peak < 200, "the answer is not collected"
    assert not (tmp_path / "two" / "below" / "large").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_transfer_that_is_slow_but_moves_is_waited_for(
    server: WandbServer, downloads: Process, tmp_path: Path
) -> None:
    server.fault("throttle", "get artifact/below", bytes_per_second=400_000)
    try:
        found = told(downloads, name="two", folder=str(tmp_path / "two"))
    finally:
        server.clear_faults()
    assert found["names"] == ["below/large", "small"]
    assert found["seconds"] > 2
    assert (tmp_path / "two" / "below" / "large").read_bytes() == bytes(range(256)) * 4000


def test_a_server_that_only_drips_is_given_up(server: WandbServer, downloads: Process) -> None:
    server.fault("drip")
    try:
        found = told(downloads, name="two")
    finally:
        server.clear_faults()
    assert "W&B does not take the credentials, or does not answer" in found["error"]
    assert found["seconds"] < 40
