"""The articles of W&B's guide: the recipe of each does on a stand-in what the article shows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from harness.tasks.text.glue import GLUE
from tests.support.recipes.figures import evaluations
from tests.support.recipes.stand_ins import PARITY, TEXTS, flags_of, run_recipe, save_model, train
from tests.support.two_processes import rows
from tests.support.wandb.file import read_all

FEW = {"max_steps": 2, "logging_steps": 1}
USERS = {"ada": "the old cat sat", "bob": "the red dog sat"}


def glue_rows(task: str) -> Dataset:
    """Rows with the columns of a GLUE task, as nyu-mll/glue has them."""
    texts = dict(zip(GLUE[task].columns, (TEXTS, TEXTS[::-1]), strict=False))
    label = Value("float32") if task == "stsb" else ClassLabel(names=["no", "yes"])
    features = {name: Value("string") for name in texts} | {"label": label, "idx": Value("int32")}
    columns = {**texts, "label": [5.0 * each for each in PARITY] if task == "stsb" else PARITY}
    return Dataset.from_dict({**columns, "idx": list(range(len(TEXTS)))}, features=Features(features))


@pytest.mark.parametrize("name", ["distilbert_glue", "cola", "imdb_distilbert"])
def test_a_classifier_learns_its_stand_in(name: str, tmp_path: Path) -> None:
    _, found = evaluations(name, tmp_path)
    assert found[-1]["eval_loss"] < 0.8 * found[0]["eval_loss"]


@pytest.mark.parametrize("task", GLUE)
def test_distilbert_takes_any_task_of_glue(task: str, tmp_path: Path) -> None:
    data = glue_rows(task)
    held = [f"validation_{kind}" for kind in ("matched", "mismatched")] if task == "mnli" else ["validation"]
    splits = {"train": data, **{name: data.select(range(8)) for name in held}}
    named: dict[str, Any] = {"task_name": task, **({"metric_for_best_model": "mnli_loss"} if task == "mnli" else {})}
    state = train("distilbert_glue", tmp_path, **flags_of("distilbert_glue", tmp_path, splits), **named, **FEW)
    prefix = "eval_mnli_" if task == "mnli" else "eval_"
    wanted = {f"{prefix}{name}" for name in ("loss", *GLUE[task].metrics)}
    assert wanted <= {name for row in state["log_history"] for name in row}
    assert state["best_metric"] is not None


def write_reviews(folder: Path, kind: str) -> Path:
    file, reviews = (
        folder / f"reviews.{kind}",
        [{"text": text, "label": "pos" if good else "neg"} for text, good in zip(TEXTS, PARITY, strict=True)],
    )
    with file.open("w", encoding="utf-8", newline="") as out:
        if kind == "csv":
            writer = csv.DictWriter(out, ["text", "label"])
            writer.writeheader()
            writer.writerows(reviews)
        else:
            out.write(json.dumps(reviews) if kind == "json" else "".join(json.dumps(row) + "\n" for row in reviews))
    return file


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_the_film_reviews_may_be_a_file_of_ones_own(kind: str, tmp_path: Path) -> None:
    """The recipe's data set is left out, and the split of it that is evaluated on: 5 % of the rows are held out."""
    given = {"model_name_or_path": save_model("distilbert", tmp_path / "model")}
    state = train("imdb_distilbert", tmp_path, **given, train_file=write_reviews(tmp_path, kind), **FEW)
    assert "eval_accuracy" in {name for row in state["log_history"] for name in row}
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert set(config["id2label"].values()) == {"neg", "pos"}


def test_tweets_of_several_users_stand_beside_each_other_in_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run a user, in one group, with a table of drawn tweets at each evaluation."""
    monkeypatch.setenv("WANDB_RUN_GROUP", "tweets")
    model, drawn = save_model("gpt2", tmp_path / "model"), {}
    for user, start in USERS.items():
        file = tmp_path / f"{user}.csv"
        file.write_text("text\n" + "".join(f"{start} on the {end}\n" for end in ("mat", "hill") * 64), encoding="utf-8")
        (tmp_path / user).mkdir()
        given = {"model_name_or_path": model, "train_file": file, "block_size": 32, "learning_rate": 1e-2}
        few: dict[str, Any] = {"max_steps": 120, "warmup_steps": 0, "per_device_train_batch_size": 8}
        few |= {"eval_strategy": "steps", "eval_steps": 60, "save_strategy": "steps", "save_steps": 60}
        wandb = {"report_to": "wandb", "run_name": user, "generate_samples": 8, "generate_max_new_tokens": 16}
        state = train("gpt2_short_texts", tmp_path / user, **given, **few, **wandb)
        (run,) = read_all(tmp_path / user / "run")
        assert (run.display_name, run.group) == (user, "tweets")
        tables = [row["sampled_texts"] for row in rows(tmp_path / user / "run") if "sampled_texts" in row]
        assert len(tables) == len([row for row in state["log_history"] if "eval_loss" in row]) == 2
        assert all(table["columns"] == ["step", "prompt", "text"] and len(table["data"]) == 8 for table in tables)
        drawn[user] = " ".join(text for table in tables for _, _, text in table["data"])
    # Each in its own words, and cut where a tweet ends.
    assert "old cat" in drawn["ada"]
    assert "dog" not in drawn["ada"]
    assert "red dog" in drawn["bob"]
    assert "cat" not in drawn["bob"]
    assert "<|end|>" not in "".join(drawn.values())


def test_early_stopping_ends_the_training_before_its_last_step(tmp_path: Path) -> None:
    """With steps too small to lower the loss: after the first evaluation and as many as its patience says."""
    steps = {"max_steps": 12, "eval_steps": 1, "save_steps": 1, "learning_rate": 1e-9, "early_stopping_patience": 2}
    state = run_recipe("early_stopping", tmp_path, **steps)
    assert state["global_step"] == 3
