"""The shipped recipes: each is read by the parser, and the quickstart trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from harness.arguments import QUICKSTART, parse
from harness.checkpoint import list_checkpoints
from harness.config import RECIPES_DIR
from harness.tasks import resolve
from harness.train import main

RECIPES = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


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
