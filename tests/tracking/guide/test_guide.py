"""
W&B's guide for Transformers, section by section: what it promises of the Trainer is here.

Its cells are a notebook of ours, harness/recipes/guide.ipynb, which runs here against the test server. The sections on
searches and articles are `harness sweep`'s and the recipes' own tests.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.config import RECIPES_DIR
from harness.errors import ConfigError
from harness.flags import parse
from harness.tracking.flags import TrackingConfig, check_environment
from harness.train import main
from tests.support.faulty_training import Training, environment
from tests.support.launching import run as run_command
from tests.support.parity import TASK, TRAINING, as_flags, reset
from tests.support.wandb.file import read_all
from tests.support.wandb.notebook import cells_of, run_cells
from tests.support.wandb_server import ArtifactRecord, RunRecord, WandbServer

TRACKED = "tests.support.tasks.tracked_task:build"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("server")) as running:
        yield running


def committed(server: WandbServer, collection: str) -> list[ArtifactRecord]:
    return [version for version in server.artifacts(collection) if version.state == "COMMITTED"]


def steps_of(run: RunRecord, key: str) -> list[int]:
    """The optimizer steps of the rows that have a key that begins so."""
    return [row["train/global_step"] for row in run.rows if any(name.startswith(key) for name in row)]


@dataclass(frozen=True)
class Played:
    """The notebook when it has run: what its cells have shown, the run that it trained in, the folder."""

    shown: dict[str, str]
    run: RunRecord
    folder: Path

    def of(self, text: str) -> str:
        """What the cell with this text has shown."""
        (found,) = [shown for cell, shown in self.shown.items() if text in cell]
        return found


@pytest.fixture(scope="module")
def notebook(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Played:
    pytest.importorskip("ipykernel")
    folder = tmp_path_factory.mktemp("notebook")
    cells = cells_of(RECIPES_DIR / "guide.ipynb")
    shown = run_cells(cells, environment(folder, server, HF_HUB_OFFLINE="1"), folder=folder)
    (run,) = [run for run in server.runs() if run.project == "guide" and run.job_type is None]
    return Played(dict(zip(cells, shown, strict=True)), run, folder)


SHOWN = {
    "builder": TRACKED,
    "max_steps": 60,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 10,
    "save_steps": 20,
    "load_best_model_at_end": True,
    "run_name": "shown",
    "wandb_eval_samples": 3,
    "wandb_eval_samples_steps": 15,
    "wandb_registry": "Guide",
    "resume_from_checkpoint": "auto",
    "task": {"seconds": 0.05},
}
# The first evaluations from steps 15, 30, 45 and 60 on.
TABLES = [20, 30, 50, 60]


@pytest.fixture(scope="module")
def resumed(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training that was killed in the middle, and went on."""
    folder = tmp_path_factory.mktemp("resumed") / "kept"
    task = {"times": str(folder / "times"), **SHOWN["task"]}
    first = Training(folder, server, **{**SHOWN, "task": task})
    while not (first.output_dir / "checkpoint-20").is_dir():
        first.reach(len(first.began_steps) + 1)
    first.reach(len(first.began_steps) + 8)
    first.process.kill()
    first.process.wait()
    assert "Going on from" not in first.out
    return Training(folder, server, **{**SHOWN, "task": task}).ended()


# Next-level logging in few lines


@pytest.mark.slow
def test_two_variables_and_report_to_are_all_it_takes(notebook: Played, server: WandbServer) -> None:
    assert notebook.run.state == "finished"
    assert steps_of(notebook.run, "train/loss")[:6] == [20, 40, 60, 80, 100, 120]
    assert committed(server, "checkpoint-first")


# Get started: track experiments > Sign up and create an API key > Install the wandb library and log in


@pytest.mark.slow
def test_with_a_key_the_run_is_online_and_its_address_is_told(notebook: Played) -> None:
    assert f"/guide/runs/{notebook.run.id}" in notebook.of('harness.run([*flags, "--max_steps", "120"])')


@pytest.mark.slow
def test_without_a_key_it_is_offline_in_the_default_project_and_has_the_topology(tmp_path: Path) -> None:
    """Nobody is asked for a key; nothing of the guide is set."""
    given = dict.fromkeys(("wandb_run_id", "wandb_log_model"))
    training = Training(tmp_path / "offline", None, max_steps=2, save_strategy="no", save_steps=None, **given).ended()
    (found,) = read_all(training.output_dir)
    assert (found.project, found.exit_code) == ("huggingface", 0)
    assert training.report[0].startswith("offline; upload it with `harness sync ")
    assert "histograms" not in training.out
    assert found.summary["graph_0"]["_type"] == "graph-file"
    graph = json.loads((found.path.parent / "files" / found.summary["graph_0"]["path"]).read_text())
    assert [node["name"] for node in graph["nodes"]] == ["transformer", "lm_head"]
    assert graph["nodes"][0]["parameters"][0] == ["wte.weight", [256, 32]]


# Name the project


@pytest.mark.parametrize("value", ["amazon_sentiment_analysis", "with a space"])
def test_the_variable_names_the_project(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", value)
    check_environment()
    assert parse(["--task", TASK]).tracking.init_kwargs()["project"] == value
    assert parse(["--task", TASK, "--wandb_project", "mine"]).tracking.init_kwargs()["project"] == "mine"


def test_the_project_is_called_huggingface_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert parse(["--task", TASK]).tracking.init_kwargs()["project"] == "huggingface"


# Log your training runs to W&B


@pytest.mark.slow
def test_loss_evaluations_topology_and_gradients_are_logged(notebook: Played) -> None:
    run = notebook.run
    assert run.name == "first"
    assert steps_of(run, "eval/loss")[:2] == [60, 120]
    assert steps_of(run, "gradients/transformer.h.1.attn.c_attn.weight") == [100]
    assert steps_of(run, "parameters/") == [100]
    assert len([name for name in run.files if name.startswith("media/graph/")]) == 1
    assert run.summary["graph_0"]["_type"] == "graph-file"


@pytest.mark.slow
def test_the_topology_comes_without_watching_and_once_however_often_a_training_is_killed(
    resumed: Training, server: WandbServer
) -> None:
    run = server.run(resumed.run_id)
    (name,) = [name for name in run.files if name.startswith("media/graph/")]
    assert run.summary["graph_0"]["path"] == name
    nodes = json.loads(run.files[name].read_text(encoding="utf-8"))["nodes"]
    assert [(node["name"], len(node["num_parameters"])) for node in nodes] == [("transformer", 28), ("lm_head", 1)]
    assert steps_of(run, "gradients/") == []


# Turn on model versioning


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("checkpoint", "checkpoint"),
        ('"checkpoint"', "checkpoint"),  # what %env makes of the guide's own line
        ("'end'", "end"),
        (" End ", "end"),
        ("false", "false"),
        ('"False"', "false"),
    ],
)
def test_wandb_log_model_is_understood_as_notebooks_set_it(
    value: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_LOG_MODEL", value)
    assert TrackingConfig.from_environment().wandb_log_model == meant


@pytest.mark.slow
def test_each_save_is_a_version_and_the_last_one_the_latest(notebook: Played, server: WandbServer) -> None:
    versions = committed(server, "checkpoint-first")
    steps = [re.findall(r"checkpoint_global_step_(\d+)", " ".join(version.aliases)) for version in versions]
    assert steps == [["60"], ["120"], ["160"]]
    assert ["latest" in version.aliases for version in versions] == [False, False, True]
    assert "final_model" in committed(server, "model-first")[-1].aliases


# Turn on model versioning > W&B Model Registry


@pytest.mark.slow
def test_the_final_model_is_linked_to_the_registry_as_was_said(resumed: Training, server: WandbServer) -> None:
    (link,) = [link for link in server.links() if link.target.endswith("/Guide")]
    assert link.source.rpartition("/")[2].startswith("model-shown:")
    place = "wandb-registry-model/Guide"
    assert f"W&B will show the final model in the registry as {place} when the training has ended." in resumed.out
    assert f"linked in the registry: {place} ({link.source.rpartition('/')[2]})" in resumed.report[-1]


# Visualize evaluation outputs during training


@pytest.mark.slow
def test_tables_of_predictions_come_by_steps_each_once_and_are_counted_over_all_attempts(
    resumed: Training, server: WandbServer
) -> None:
    run = server.run(resumed.run_id)
    assert steps_of(run, "sample_predictions") == TABLES
    due = [step for step in TABLES if step > int(re.findall(r"Going on from \S+/checkpoint-(\d+)", resumed.out)[0])]
    assert f"3 predictions with an evaluation every 15 steps: {len(due)} times, the first after step {due[0]}" in (
        resumed.out
    )
    assert "tables of predictions: 4, the last with step 60" in resumed.report


# Finish your W&B Run (Notebooks only)


@pytest.mark.slow
def test_in_a_notebook_the_run_stays_open_until_it_is_finished(notebook: Played) -> None:
    assert [row["my_note"] for row in notebook.run.rows if "my_note" in row] == [1.0]
    assert notebook.run.exit_code == 0


# Visualize your results


@pytest.mark.slow
def test_the_rows_can_be_looked_at_without_wandb(notebook: Played) -> None:
    lines = notebook.of("metrics.jsonl").splitlines()
    assert lines[0].split() == ["train/global_step", "train/loss", "eval/loss"]
    assert lines[1].split()[:2] == ["0", "20"]


# Advanced features and FAQs > How do I save the best model?


@pytest.mark.slow
def test_with_load_best_model_at_end_the_final_model_is_the_best_one(resumed: Training, server: WandbServer) -> None:
    (best,) = [version for version in committed(server, "checkpoint-shown") if "best" in version.aliases]
    final = committed(server, "model-shown")[-1]
    assert final.files["model.safetensors"] == best.files["model.safetensors"]


# How do I load a saved model?


@pytest.mark.slow
def test_the_final_model_is_loaded_by_another_run_which_notes_it(notebook: Played, server: WandbServer) -> None:
    assert "The value of" in notebook.of("from_pretrained")
    (run,) = [run for run in server.runs() if run.job_type == "inference"]
    (used,) = [version for version in server.artifacts("model-first") if run.id in version.used_by]
    assert "latest" in used.aliases


# How do I resume training from a checkpoint?


@pytest.mark.slow
def test_the_guides_resume_goes_on_with_the_run_on_an_empty_machine(notebook: Played, server: WandbServer) -> None:
    steps = steps_of(notebook.run, "train/loss")
    assert steps == [20, 40, 60, 80, 100, 120, 140, 160]
    assert (notebook.folder / "resumed" / "checkpoint-160").is_dir()
    assert not (notebook.folder / "resumed" / "checkpoint-120").exists()
    assert [run.id for run in server.runs() if run.project == "guide" and run.job_type is None] == [notebook.run.id]


# How do I log and view evaluation samples during training?


@pytest.mark.slow
def test_the_table_of_samples_has_labels_predictions_and_the_epoch(notebook: Played) -> None:
    assert steps_of(notebook.run, "sample_predictions") == [60, 120]
    table = json.loads(notebook.run.files[notebook.run.summary["sample_predictions"]["path"]].read_text())
    assert table["columns"] == ["inputs", "labels", "predictions", "epoch"]
    assert len(table["data"]) == 3


# What additional W&B settings are available?


@pytest.mark.parametrize(
    ("value", "meant"),
    [("all", "all"), ('"all"', "all"), ("Gradients", "gradients"), ("false", "false"), ("'false'", "false")],
)
def test_wandb_watch_is_understood_as_notebooks_set_it(value: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_WATCH", value)
    assert TrackingConfig.from_environment().wandb_watch == meant


@pytest.mark.parametrize(("value", "meant"), [("true", True), ('"true"', True), (" True ", True), ("false", False)])
def test_wandb_disabled_turns_logging_off_as_the_guide_says(
    value: str, meant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert TrackingConfig.from_environment().uses_wandb is not meant


def test_a_training_with_wandb_disabled_leaves_nothing_of_wandbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reset()
    monkeypatch.setenv("WANDB_DISABLED", "true")
    flags = {**TRAINING, "task": TASK, "max_steps": 1, "report_to": "wandb", "output_dir": tmp_path / "out"}
    assert main([*as_flags({**flags, "wandb_watch": "all", "use_cpu": True})]) == 0
    assert not [path for path in tmp_path.rglob("*") if "wandb" in path.name]
    assert "W&B" not in capsys.readouterr().out


@pytest.mark.parametrize("value", ["true", "True", "1"])
def test_wandb_silent_hides_what_wandb_prints(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", value)
    check_environment()
    assert TrackingConfig.from_environment().wandb_silent


@pytest.mark.parametrize(("name", "value"), [("WANDB_WATCH", "gradient"), ("WANDB_LOG_MODEL", "true")])
def test_a_value_that_is_none_is_refused_and_not_passed_over(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        TrackingConfig.from_environment()


# How do I customize wandb.init?

CUSTOM = """
import json, sys
import harness, wandb

run = wandb.init(
    project="amazon_sentiment_analysis", name="bert-base-high-lr", tags=["baseline", "high-lr"], group="bert"
)
result = harness.run(json.loads(sys.argv[1]))
assert wandb.run is run and result.run_id == run.id
run.log({"own": 1})
run.finish()
"""


@pytest.mark.slow
def test_a_run_that_was_opened_first_is_used_and_left_open(server: WandbServer, tmp_path: Path) -> None:
    flags = as_flags({**TRAINING, "task": TASK, "max_steps": 2, "run_name": "not mine", "output_dir": tmp_path / "out"})
    command = [sys.executable, "-c", CUSTOM, json.dumps([*flags, "--use_cpu"])]
    ended = run_command(command, cwd=tmp_path, **environment(tmp_path, server, WANDB_PROJECT="not-mine"))
    assert ended.code == 0, ended.err
    (run,) = [run for run in server.runs() if run.project == "amazon_sentiment_analysis"]
    assert (run.name, run.tags, run.group) == ("bert-base-high-lr", ["baseline", "high-lr"], "bert")
    assert steps_of(run, "train/loss") == [1, 2]
    assert run.rows[-1]["own"] == 1
    assert (run.state, run.summary["graph_0"]["_type"]) == ("finished", "graph-file")
    assert server.unknown() == []
