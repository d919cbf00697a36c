"""A secret in each of many places, looked for in everything that trainings write, show and send."""

from __future__ import annotations

import base64
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.support.faulty_training import ROOT, Training
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

    def __init__(self, folder: Path, server: WandbServer, canaries: Canaries, **more: str) -> None:
        here = folder / "repository"
        here.mkdir(parents=True)
        (here / "canary_task.py").write_text(TASK)
        holds = {"wandb_job_type": f"mysql://someone:{canaries.of['YAML']}@database.example/runs"}
        (here / "own.yaml").write_text(yaml.safe_dump(holds))
        remote = f"https://{canaries.of['git remote']}:x-oauth-basic@github.com/org/repository.git"
        for command in (
            "init -q",
            "add .",
            "-c user.name=a -c user.email=a@b commit -qm a",
            f"remote add origin {remote}",
        ):
            subprocess.run(["git", *command.split()], cwd=here, check=True)
        variables = {**canaries.variables(server), "PYTHONPATH": f"{ROOT}:{here}", **more}
        given = {**canaries.flags(), "config": "own.yaml", "max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
        args = canaries.task_args()
        super().__init__(folder, server, builder="canary_task:build", task=args, variables=variables, cwd=here, **given)

    @property
    def run_arguments(self) -> list[str]:
        return self.flags_for(self.folder)


@pytest.fixture(scope="module")
def canaries() -> Canaries:
    return Canaries.hatched()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def trained(canaries: Canaries, server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Canary:
    return Canary(tmp_path_factory.mktemp("trained") / "good", server, canaries).ended()


def found_in(canaries: Canaries, *folders: Path) -> list[str]:
    """Where which secret stands; the repository holds what the user has put there."""
    keys = {"WANDB_API_KEY": API_KEY, "WANDB_API_KEY, sent": base64.b64encode(f"api:{API_KEY}".encode()).decode()}
    files = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "repository" not in path.parts
    ]
    return [
        f"{place}: {path}"
        for path in files
        for content in [path.read_bytes()]
        for place, secret in {**keys, **canaries.of}.items()
        if secret.encode() in content
    ]


def test_no_secret_leaves_a_training(trained: Canary, server: WandbServer, canaries: Canaries) -> None:
    assert len(canaries.of) >= 20
    assert [each for each in server.artifacts() if each.state == "COMMITTED"]
    found = found_in(canaries, trained.folder, server.folder)
    assert not found, "\n".join(found)
