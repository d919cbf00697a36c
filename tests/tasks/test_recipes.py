"""The shipped recipes: each is read by the parser and trains, those of the Hub on small stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from harness.checkpoint.find import list_checkpoints
from harness.config import RECIPES_DIR, recipe_names
from harness.flags import QUICKSTART, parse
from harness.tasks import resolve
from harness.train import main
from tests.support.images import SHAPES, draw, needs_image_processor, save_image_processor
from tests.support.inputs import SENTENCES, save_bert_tokenizer, save_gpt_tokenizer

RECIPES = recipe_names()
TINY = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "vit": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 4,
    },
}


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


# The recipes of the Hub: what stands in for their model and data, and the metric that decides.
TEXTS = SENTENCES * 4
PARITY = [index % 2 for index in range(len(TEXTS))]
TAGS = ("O", "B-PER", "I-PER", "B-LOC")


def labelled(names: list[str], **columns: list[str]) -> Dataset:
    features = {name: Value("string") for name in columns} | {"label": ClassLabel(names=names)}
    return Dataset.from_dict({**columns, "label": PARITY}, features=Features(features))


def words() -> Dataset:
    features = Features(
        {"id": Value("string"), "tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=TAGS))}
    )
    rows = {"id": [str(index) for index in range(len(TEXTS))], "tokens": [text.split() for text in TEXTS]}
    return Dataset.from_dict({**rows, "ner_tags": [[0, 1, 2, 0, 0, 0, 3]] * len(TEXTS)}, features=features)


def leaves() -> Dataset:
    features = Features({"image_file_path": Value("string"), "image": Image(), "labels": ClassLabel(names=SHAPES)})
    numbers = [index % 3 for index in range(len(TEXTS))]
    images = [draw(SHAPES[number], index) for index, number in enumerate(numbers)]
    return Dataset.from_dict({"image_file_path": TEXTS, "image": images, "labels": numbers}, features=features)


PAIRS = {"sentence1": TEXTS, "sentence2": TEXTS[::-1]}
STAND_INS: dict[str, tuple[str, Callable[[], Dataset], str]] = {
    "beans_vit": ("vit", leaves, "eval_accuracy"),
    "cola": ("bert", lambda: labelled(["unacceptable", "acceptable"], sentence=TEXTS), "eval_matthews_correlation"),
    "conll_ner": ("bert", words, "eval_f1"),
    "early_stopping": ("bert", lambda: labelled(["not_equivalent", "equivalent"], **PAIRS), "eval_loss"),
    "gpt2_short_texts": ("gpt2", lambda: labelled(["negative", "positive"], text=TEXTS), "eval_loss"),
    "imdb_distilbert": ("distilbert", lambda: labelled(["neg", "pos"], text=TEXTS), "eval_accuracy"),
    "imdb_lora": ("distilbert", lambda: labelled(["neg", "pos"], text=TEXTS), "eval_accuracy"),
    "rte": ("bert", lambda: labelled(["entailment", "not_entailment"], **PAIRS), "eval_accuracy"),
}


def save_model(model_type: str, folder: Path) -> Path:
    """A tiny model with its tokenizer or image processor, as from_pretrained has them from the Hub."""
    if model_type == "vit":
        save_image_processor(folder)
        AutoModel.from_config(AutoConfig.for_model(model_type, **TINY[model_type])).save_pretrained(folder)
        return folder
    (save_gpt_tokenizer if model_type == "gpt2" else save_bert_tokenizer)(folder)
    size = len(AutoTokenizer.from_pretrained(folder))
    AutoModel.from_config(AutoConfig.for_model(model_type, vocab_size=size, **TINY[model_type])).save_pretrained(folder)
    return folder


def run_recipe(name: str, folder: Path, **changed: Any) -> dict[str, Any]:
    """The state that a run of the recipe ends with, on 32 rows that have the Hub's columns and splits."""
    model_type, rows, _ = STAND_INS[name]
    held = parse(["--config", name]).task.validation_split_name or "validation"
    DatasetDict({"train": rows(), held: rows().select(range(8))}).save_to_disk(folder / "data")
    flags = {"model_name_or_path": save_model(model_type, folder / "model"), "dataset_name": folder / "data", **changed}
    argv = ["--config", name, *(f"--{flag}={value}" for flag, value in flags.items())]
    assert main([*argv, f"--output_dir={folder / 'run'}", "--report_to=none", "--use_cpu"]) == 0
    state: dict[str, Any] = json.loads((folder / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    return state


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
