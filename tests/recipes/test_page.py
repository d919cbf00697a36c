"""The page of the recipes: it names each of them, and the commands that bring model and data are those of the code."""

from __future__ import annotations

import re
import shlex

import pytest

from harness.config import RECIPES_DIR
from harness.flags import parse
from harness.tasks.hub import wanted_of
from tests.support.pages import TEXTS, commands, section
from tests.support.recipes.stand_ins import STAND_INS

PAGE = TEXTS["harness/recipes/README.md"]
# Those of the guide, in its order.
ARTICLES = (
    "Hyperparameter Optimization for Hugging Face Transformers",
    "Hugging Tweets: Train a Model to Generate Tweets",
    "Sentence Classification With Hugging Face BERT and W&B",
    "A Step by Step Guide to Tracking Hugging Face Model Performance",
    "Examples of Early Stopping in HuggingFace",
    "How to Fine-Tune Hugging Face Transformers on a Custom Dataset",
)


def cells(title: str) -> list[list[str]]:
    lines = [line for line in section(title, PAGE).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_every_file_of_the_folder_is_named() -> None:
    names = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))
    assert not [name for name in names if f"`{name}`" not in PAGE and f" {name}`" not in PAGE]


def test_each_article_has_a_row_with_a_command() -> None:
    rows = cells("## The articles of W&B's guide")
    assert [row[0] for row in rows] == list(ARTICLES)
    for row in rows:
        for command in re.findall(r"`(harness (?:train|sweep) [^`]+)`", row[1]):
            words = shlex.split(command)
            if words[1] == "train":
                assert parse(words[2:]).run.config in STAND_INS
        assert "harness " in row[1]


@pytest.mark.parametrize("name", STAND_INS)
def test_what_a_machine_without_internet_needs_is_on_the_page(name: str) -> None:
    config = parse(["--config", name]).task
    needed = list(dict.fromkeys(each.download(config) for each in wanted_of(config)))
    assert len(needed) == 2
    row = next(row for row in cells("## Without internet") if f"`{name}`" in row[0])
    assert re.findall(r"`([^`]+)`", row[1]) == needed


@pytest.mark.parametrize("name", STAND_INS)
def test_each_recipe_has_the_figures_of_its_stand_in(name: str) -> None:
    """`python -m tests.support.recipes` prints them."""
    (row,) = [row for row in cells("## Figures on stand-ins") if row[0] == f"`{name}`"]
    assert int(row[1]) > 0
    before, after = map(float, re.findall(r"\d+\.\d+", row[2]))
    assert after < before


def test_a_file_of_ones_own_takes_the_place_of_the_recipes_data() -> None:
    command = next(each for each in commands(PAGE) if "reviews.csv" in each)
    task = parse(shlex.split(command)[2:]).task
    assert task.train_file == ["reviews.csv"]
    assert (task.dataset_name, task.validation_split_name) == (None, None)
    assert parse(["--config", "imdb_distilbert", "--dataset_name", "data"]).task.validation_split_name == "test"
