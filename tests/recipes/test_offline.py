"""Without a network: what is missing is said at once, and what is in the Hub's cache is taken from there."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets import Dataset
from huggingface_hub import constants

from harness.flags import parse
from harness.tasks import hub
from harness.tasks.hub import wanted_of
from tests.support.launching import ROOT
from tests.support.recipes.stand_ins import STAND_INS, save_model

COLA = (
    "--config=cola needs --model_name_or_path=google-bert/bert-base-cased and --task_name=cola (nyu-mll/glue): no such "
    "folder here, not in the Hub's cache, and the Hub can't be reached{why}; check the name, or run `hf download "
    "google-bert/bert-base-cased` and `hf download nyu-mll/glue --repo-type dataset` where there is a network first."
)
# Nobody listens there; a user's proxy would be asked in its place.
NOBODY = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "*", "HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
SMALL = [
    "--max_steps=2",
    "--save_strategy=no",
    "--eval_strategy=steps",
    "--eval_steps=2",
    "--load_best_model_at_end=no",
]


def started(
    argv: list[str], home: Path, variables: Mapping[str, str]
) -> tuple[subprocess.CompletedProcess[str], float]:
    """A command in a process of its own, with a home of the Hub's files, and the seconds that it took."""
    variables = {"HF_HOME": str(home), "HF_DATASETS_CACHE": str(home / "datasets"), **variables}
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "harness", "train", *argv, "--report_to=none", "--use_cpu"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )
    return ended, time.monotonic() - began


def store(home: Path, kind: str, name: str, folder: Path) -> Path:
    """Put a folder into the Hub's cache as `hf download` does: files, links to them, and the name of a commit."""
    place = home / "hub" / "--".join([kind, *name.split("/")])
    commit = place / "snapshots" / ("0123456789" * 4)
    for number, file in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        blob, link = place / "blobs" / f"{number:040x}", commit / file.relative_to(folder)
        for parent in (blob.parent, link.parent, place / "refs"):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(blob)
    (place / "refs" / "main").write_text(commit.name, encoding="utf-8")
    return commit


@pytest.mark.parametrize(("variables", "why"), [(OFFLINE, " (HF_HUB_OFFLINE is set)"), (NOBODY, "")])
def test_what_is_missing_is_said_before_a_library_is_loaded(
    variables: dict[str, str], why: str, tmp_path: Path
) -> None:
    ended, seconds = started(["--config=cola", f"--output_dir={tmp_path / 'run'}"], tmp_path, variables)
    assert ended.returncode == 2
    assert ended.stderr == f"harness train: {COLA.format(why=why)}\n"  # without the line that tells of loading torch
    assert ended.stdout == ""
    assert not (tmp_path / "run").exists()
    assert seconds < 20  # two on a quiet machine


@pytest.mark.parametrize("name", STAND_INS)
def test_the_commands_are_those_of_the_recipe(name: str) -> None:
    config = parse(["--config", name]).task
    model, data = (each.download(config) for each in wanted_of(config))
    assert model == f"hf download {config.model_name_or_path}"
    assert data == f"hf download {config.dataset_name or 'nyu-mll/glue'} --repo-type dataset"


def test_a_command_names_revision_and_cache_where_they_are_given() -> None:
    given = ["--model_name_or_path=a/b", "--dataset_name=c/d", "--model_revision=v1", "--cache_dir=my files"]
    config = parse(given).task
    assert [each.download(config) for each in wanted_of(config)] == [
        "hf download a/b --revision v1 --cache-dir 'my files'",
        "hf download c/d --repo-type dataset --cache-dir 'my files'",
    ]


def test_what_is_here_is_not_wanted_from_the_hub(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "data.csv"
    folder.mkdir()
    for argv in (
        [f"--model_name_or_path={folder}", f"--train_file={file}"],
        [f"--model_name_or_path={folder}", f"--dataset_name={folder}"],
        ["--model_name_or_path=wandb:entity/project/model:v0", f"--train_file={file}"],
        ["--task=mine:build", "--model_name_or_path=a/b", "--dataset_name=c/d"],
        [],
    ):
        assert wanted_of(parse(argv).task) == []
    assert [each.name for each in wanted_of(parse(["--task_name=rte", "--model_type=bert"]).task)] == ["nyu-mll/glue"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The Hub's files as after `hf download`, for the recipe cola with a tiny model and few rows."""
    home = tmp_path / "home"
    store(home, "models", "google-bert/bert-base-cased", save_model("bert", tmp_path / "model"))
    rows = STAND_INS["cola"][1]()
    data = tmp_path / "data"
    for split, few in (("train", rows), ("validation", rows.select(range(8)))):
        Dataset.to_parquet(few, data / "cola" / f"{split}-00000-of-00001.parquet")
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: cola\n  data_files:\n  - split: train\n    path: cola/train-*\n"
        "  - split: validation\n    path: cola/validation-*\n---\n",
        encoding="utf-8",
    )
    store(home, "datasets", "nyu-mll/glue", data)
    return home


@pytest.mark.slow
def test_what_was_downloaded_is_all_that_a_recipe_needs(home: Path) -> None:
    ended, _ = started(["--config=cola", *SMALL, f"--output_dir={home / 'run'}"], home, NOBODY)
    assert ended.returncode == 0, ended.stderr
    assert "eval_matthews_correlation" in ended.stdout
    told = "The Hub can't be reached: model and data are taken from its cache."
    assert ended.stderr.splitlines().count(told) == 1


def test_the_libraries_are_offline_for_one_training_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's next training may have a network again."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    with hub.hub_or_cache(parse(["--config=cola"]).task, "cola"):
        assert huggingface_hub.is_offline_mode()
        assert datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.is_offline_mode()
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("left", ["model.safetensors", "cola"])
def test_half_a_download_is_missing(left: str, home: Path) -> None:
    (found,) = home.rglob(f"snapshots/*/{left}")
    shutil.rmtree(found) if found.is_dir() else found.resolve().unlink()
    ended, _ = started(["--config=cola"], home, OFFLINE)
    assert ended.returncode == 2
    assert ended.stderr.count("hf download") == 1
    assert ("nyu-mll/glue" if left == "cola" else "google-bert/bert-base-cased") in ended.stderr


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_server_is_found_directly_or_through_a_proxy(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert hub.is_reachable(f"http://127.0.0.1:{listening}")
    assert not hub.is_reachable("http://127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{listening}")
    assert hub.is_reachable("https://nowhere.invalid")
    monkeypatch.setenv("NO_PROXY", "nowhere.invalid")
    assert not hub.is_reachable("https://nowhere.invalid")
