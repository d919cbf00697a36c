"""The shipped recipes: each is read by the parser and trains, those of the Hub on small stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from harness.checkpoint.find import list_checkpoints
from harness.config import RECIPES_DIR, recipe_names
from harness.flags import QUICKSTART, parse
from harness.tasks import resolve
from harness.train import main
from tests.support.images import needs_image_processor
from tests.support.recipes.stand_ins import STAND_INS, run_recipe

RECIPES = recipe_names()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_says(name: str) -> None:
    written = yaml.safe_load((RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    read = parse(["--config", name]).flat()
    assert {key: read[key] for key in written} == written


@pytest.mark.parametrize("name", RECIPES)
def test_a_flag_wins_over_a_recipe(name: str) -> None:
    assert parse(["--config", name, "--learning_rate", "0.125"]).optim.learning_rate == 0.125


@pytest.mark.parametrize("name", RECIPES)
def test_the_task_of_a_recipe_exists(name: str) -> None:
    assert callable(resolve(parse(["--config", name]).task.task))


@pytest.mark.parametrize("name", RECIPES)
def test_the_configuration_written_down_is_the_same_one(name: str, tmp_path: Path) -> None:
    config = parse(["--config", name])
    file = tmp_path / "harness_config.yaml"
    file.write_text(config.as_yaml(), encoding="utf-8")
    again = parse(["--config", str(file)]).flat()
    assert {**again, "config": name} == config.flat()


def test_without_any_flag_it_is_the_quickstart() -> None:
    assert {**parse([]).flat(), "config": QUICKSTART} == parse(["--config", QUICKSTART]).flat()


def test_the_quickstart_trains_evaluates_saves_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--max_steps", "3", "--logging_steps", "1", "--eval_steps", "3", "--save_steps", "3"]
    small += ["--max_train_samples", "32", "--max_eval_samples", "8", "--warmup_steps", "0"]
    output_dir = tmp_path / "run"
    assert main([*small, "--output_dir", str(output_dir), "--report_to", "none", "--use_cpu"]) == 0
    shown = capsys.readouterr().out
    assert "sample: " in shown
    assert str(output_dir) in shown
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-3"]
    for folder in (output_dir, output_dir / "checkpoint-3"):
        names = {path.name for path in folder.iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "trainer_state.json"} <= names
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3]


def test_each_recipe_of_the_hub_has_a_stand_in() -> None:
    assert set(STAND_INS) == set(RECIPES) - {QUICKSTART}
    for name, (model_type, _, _) in STAND_INS.items():
        assert model_type in str(parse(["--config", name]).task.model_name_or_path)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_image_processor if name == "beans_vit" else ()) for name in STAND_INS]
)
def test_a_recipe_of_the_hub_trains_evaluates_and_keeps_the_best(name: str, tmp_path: Path) -> None:
    changed: dict[str, Any] = {"max_steps": 4, "logging_steps": 1}
    if parse(["--config", name]).plan.eval_strategy == "steps":
        changed |= {"eval_steps": 2, "save_steps": 2}
    if name == "gpt2_short_texts":
        changed |= {"block_size": 16}  # the rows are too few for longer ones
    if name == "beans_vit":
        changed |= {"per_device_train_batch_size": 16}  # else they are one epoch, with one evaluation
    state = run_recipe(name, tmp_path, **changed)
    metric = STAND_INS[name][2]
    assert len([entry for entry in state["log_history"] if "loss" in entry]) == 4
    scores = [entry[metric] for entry in state["log_history"] if metric in entry]
    assert len(scores) >= 2
    assert state["best_metric"] == (min if metric == "eval_loss" else max)(scores)
    best = Path(state["best_model_checkpoint"])
    assert best in list_checkpoints(tmp_path / "run")


def test_the_recipe_of_early_stopping_stops_early(tmp_path: Path) -> None:
    """With steps too small to lower the loss: after the first evaluation and four that are not better."""
    steps = {"max_steps": 12, "eval_steps": 1, "save_steps": 1, "learning_rate": 1e-9}
    state = run_recipe("early_stopping", tmp_path, **steps)
    assert state["global_step"] == 5
    assert len([entry for entry in state["log_history"] if "eval_loss" in entry]) == 5


def test_the_recipe_of_lora_ends_with_an_adapter_and_a_whole_model(tmp_path: Path) -> None:
    run_recipe("imdb_lora", tmp_path, max_steps=2)
    assert {"adapter_model.safetensors", "merged"} <= {path.name for path in (tmp_path / "run").iterdir()}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "merged")
    assert model.config.id2label == {0: "neg", 1: "pos"}
