"""A secret in each of many places, looked for in everything that trainings write, show and send."""

from __future__ import annotations

import base64
import json
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.__main__ import main
from tests.support.faulty_training import ROOT, Training, committed
from tests.support.parity import as_flags
from tests.support.wandb_server import API_KEY, WandbServer

pytestmark = pytest.mark.slow

# Of a user's own: it quotes what it was given, as libraries do in their errors.
TASK = """
import os
from dataclasses import replace
from harness.config import Json
from tests.support.tasks import faulty_task

def build(config):
    given = dict(config.task_args)
    own = {name: given.pop(name) for name in [*given] if name in ("service", "mirror", "headers", "pem", "store")}
    task = faulty_task.build(replace(config, task_args=Json(given)))
    task.model.config.mirror, task.model.config.api_key = own["mirror"], own["service"]["api_key"]
    if "raises" in os.environ.get("CANARY", ""):
        raise RuntimeError(f"can't open {own} as {os.environ['AWS_SECRET_ACCESS_KEY']} with {config.token}")
    return task
"""


def made(shape: str) -> str:
    """A secret of this shape, made up anew: nothing that is written can hold it by chance."""
    return shape.format(hex=secrets.token_hex(20), text=secrets.token_hex(17), word=f"Pa55{secrets.token_hex(8)}")


@dataclass(frozen=True)
class Canaries:
    """The secrets by place."""

    of: dict[str, str]

    @classmethod
    def hatched(cls) -> Canaries:
        shapes = {
            "variable HF_TOKEN": "hf_{text}",
            "variable AWS_SECRET_ACCESS_KEY": "{hex}",
            "variable WANDB_BASE_URL": "{word}",
            "variable HTTP_PROXY": "{word}",
            "variable ACCELERATE_TRACE_URL": "{word}",
            "variable WANDB_NOTES": "sk-ant-{text}",
            "variable WANDB_TAGS": "ghp_{text}",
            "--token": "{hex}",
            "--task_args, a name": "{hex}",
            "--task_args, a nested name": "{hex}",
            "--task_args, a header": "{hex}",
            "--task_args, an address": "{word}",
            "--task_args, a private key": "{hex}",
            "--task_args, a password": "{word}",
            "--config_overrides": "{hex}",
            "--optim_args": "{hex}",
            "--dataset_name": "{word}",
            "--model_name_or_path": "{text}",
            "--test_file": "{hex}",
            "--run_name": "hf_{text}",
            "--wandb_run_group": "AKIA2E0A8F3B244C9986",
            "--cache_dir": "{word}",
            "YAML": "{word}",
            "git remote": "{text}",
        }
        return cls({place: made(shape) for place, shape in shapes.items()})

    def variables(self, server: WandbServer) -> dict[str, str]:
        def address(place: str, host: str) -> str:
            return f"http://someone:{self.of[place]}@{host}"

        return {
            "HF_TOKEN": self.of["variable HF_TOKEN"],
            "AWS_SECRET_ACCESS_KEY": self.of["variable AWS_SECRET_ACCESS_KEY"],
            "WANDB_BASE_URL": address("variable WANDB_BASE_URL", server.url.removeprefix("http://")),
            "HTTP_PROXY": address("variable HTTP_PROXY", "127.0.0.1:9"),
            "NO_PROXY": "127.0.0.1",
            "ACCELERATE_TRACE_URL": address("variable ACCELERATE_TRACE_URL", "traces.example"),
            "WANDB_NOTES": f"bought with {self.of['variable WANDB_NOTES']}",
            "WANDB_TAGS": f"first,{self.of['variable WANDB_TAGS']}",
        }

    def task_args(self) -> dict[str, object]:
        begin, end = (f"-----{word} PRIVATE KEY-----" for word in ("BEGIN", "END"))
        return {
            "service": {
                "api_key": self.of["--task_args, a name"],
                "logins": [{"accessToken": self.of["--task_args, a nested name"]}],
            },
            "headers": {"Authorization": f"Bearer {self.of['--task_args, a header']}"},
            "mirror": f"https://someone:{self.of['--task_args, an address']}@mirror.example/data",
            "pem": f"{begin}\n{self.of['--task_args, a private key']}\n{end}\n",
            "store": {"db_password": self.of["--task_args, a password"]},
        }

    def flags(self) -> dict[str, str]:
        return {
            "token": self.of["--token"],
            "config_overrides": f"n_layer=2,api_key={self.of['--config_overrides']}",
            "dataset_name": f"https://someone:{self.of['--dataset_name']}@data.example/set",
            "model_name_or_path": f"https://{self.of['--model_name_or_path']}:x-oauth-basic@hub.example/org/model",
            "test_file": f"https://data.example/a.jsonl?X-Amz-Signature={self.of['--test_file']}&part=1",
            "run_name": f"run-{self.of['--run_name']}",
            "wandb_run_group": self.of["--wandb_run_group"],
        }


class Canary(Training):
    """The tiny training of a user with secrets, in a git repository whose remote has one."""

    def __init__(
        self,
        folder: Path,
        server: WandbServer,
        canaries: Canaries,
        *,
        variables: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        here = folder / "repository"
        fill(here, canaries)
        given = {"builder": "canary_task:build", "task": canaries.task_args(), **canaries.flags()}
        super().__init__(
            folder,
            server,
            variables={**canaries.variables(server), "PYTHONPATH": f"{ROOT}:{here}", **(variables or {})},
            cwd=here,
            **{**given, "config": "own.yaml", "max_steps": 4, "save_steps": 2, **arguments},
        )


def fill(folder: Path, canaries: Canaries) -> None:
    """Make the user's repository, with a task and a file of flags."""
    folder.mkdir(parents=True)
    (folder / "canary_task.py").write_text(TASK)
    holds = {"wandb_job_type": f"mysql://someone:{canaries.of['YAML']}@database.example/runs"}
    (folder / "own.yaml").write_text(yaml.safe_dump(holds))
    remote = f"https://{canaries.of['git remote']}:x-oauth-basic@github.com/org/repository.git"
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm a", f"remote add origin {remote}"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)


@pytest.fixture(scope="module")
def canaries() -> Canaries:
    return Canaries.hatched()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("server")) as server:
        yield server


def found_in(canaries: Canaries, *folders: Path) -> list[str]:
    """Where which secret stands; the repository holds what the user has put there."""
    keys = {"WANDB_API_KEY": API_KEY, "WANDB_API_KEY, sent": base64.b64encode(f"api:{API_KEY}".encode()).decode()}
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [
        f"{place}: {path}"
        for path in files
        if "repository" not in path.parts
        for content in [path.read_bytes()]
        for place, secret in {**keys, **canaries.of}.items()
        if secret.encode() in content
    ]


def test_no_secret_leaves_a_training_and_its_resume(canaries: Canaries, server: WandbServer, tmp_path: Path) -> None:
    assert len(canaries.of) >= 20
    training = Canary(tmp_path / "good", server, canaries).ended()
    # What was looked through is what would hold them: the masks are there.
    run = server.run("good")
    assert run.config["task_args"]["service"] == {"api_key": "<API_KEY>", "logins": [{"accessToken": "<ACCESSTOKEN>"}]}
    metadata = json.loads(run.files["wandb-metadata.json"].read_text())
    assert metadata["git"]["remote"] == "https://<SECRET>@github.com/org/repository.git"
    assert len(metadata["git"]["commit"]) == 40
    assert "--token=<SECRET>" in metadata["args"]
    assert list(committed(server))
    assert "<SECRET>" in (training.output_dir / "README.md").read_text()
    assert "<SECRET>" in (training.output_dir / "checkpoint-4" / "harness_state.json").read_text()
    found = found_in(canaries, training.folder, server.folder)
    assert not found, "\n".join(found)

    # The keys are others a day later.
    again = Canaries.hatched()
    shutil.rmtree(training.folder / "repository")
    resumed = Canary(tmp_path / "good", server, again, resume_from_checkpoint="true", max_steps=6).ended()
    assert "Other arguments" in resumed.out
    assert [row["train/global_step"] for row in server.run("good").rows][-1] == 6
    found = [*found_in(canaries, tmp_path, server.folder), *found_in(again, tmp_path, server.folder)]
    assert not found, "\n".join(found)


def test_no_secret_leaves_a_crash(canaries: Canaries, server: WandbServer, tmp_path: Path) -> None:
    training = Canary(tmp_path / "crash", server, canaries, variables={"CANARY": "raises"}).ended(1)
    assert "RuntimeError: can't open {" in training.err
    assert training.err.count("<SECRET>") >= 5
    found = found_in(canaries, training.folder, server.folder)
    assert not found, "\n".join(found)


BAD = {
    "a key with a newline": ({"WANDB_API_KEY": "{secret}\n"}, {}, "WANDB_API_KEY is refused by wandb: "),
    "an address that is none": (
        {"WANDB_BASE_URL": "ftp://me:{secret}@host"},
        {},
        "WANDB_BASE_URL=ftp://<SECRET>@host is",
    ),
    "an optimizer's arguments": ({}, {"optim_args": "api_key={secret},b=1"}, "--optim_args"),
    "arguments that are no JSON": ({}, {"task_args": '{{"password": "{secret}"'}, "--task_args: not JSON"),
    "a task that is not there": ({}, {"builder": "https://me:{secret}@host"}, "<SECRET>@host"),
}


@pytest.mark.parametrize("case", BAD)
def test_no_secret_leaves_what_is_refused(case: str, canaries: Canaries, server: WandbServer, tmp_path: Path) -> None:
    variables, flags, message = BAD[case]
    secret = canaries.of["--optim_args"]
    of_case = {name: value.format(secret=secret) for name, value in variables.items()}
    given = {name: value.format(secret=secret) for name, value in flags.items()}
    training = Canary(tmp_path / "bad", server, canaries, variables=of_case, **given).ended(2)
    assert message in training.err
    assert len(training.err.splitlines()) == 1
    found = found_in(canaries, training.folder)
    assert not found, "\n".join(found)


KEPT_OFFLINE = {
    "a server that is not there": (
        "WANDB_BASE_URL",
        "http://someone:{variable WANDB_BASE_URL}@127.0.0.1:9",
        "W&B could not be reached (http://<SECRET>@127.0.0.1:9: ConnectionError): the run is kept offline",
    ),
    "a key in two lines": ("WANDB_API_KEY", "{--optim_args}\n{--optim_args}", "WANDB_API_KEY invalid"),
}


@pytest.mark.parametrize("case", KEPT_OFFLINE)
def test_no_secret_leaves_a_run_that_is_kept_offline(
    case: str, canaries: Canaries, server: WandbServer, tmp_path: Path
) -> None:
    name, value, message = KEPT_OFFLINE[case]
    variables = {name: value.format_map(canaries.of)}
    training = Canary(tmp_path / "alone", server, canaries, variables=variables).ended()
    assert message in training.err
    found = found_in(canaries, training.folder)
    assert not found, "\n".join(found)


def test_no_secret_leaves_a_submission(
    canaries: Canaries, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", canaries.of["variable HF_TOKEN"])
    kept = ("token", "config_overrides", "run_name", "wandb_run_group")
    of_task = {"task": "a:b", "task_args": canaries.task_args(), "optim_args": f"key={canaries.of['--optim_args']}"}
    flags = {**{name: canaries.flags()[name] for name in kept}, **of_task}
    assert main(["submit", "--dry-run", "--gpus-per-node=0", *as_flags(flags)]) == 0
    said = capsys.readouterr()
    assert "--token=<SECRET>" in said.out
    assert not [place for place, secret in canaries.of.items() if secret in said.out + said.err]
