"""Stand-ins for the models and data sets that recipes take from the Hub, and what a recipe makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from transformers import AutoConfig, AutoModel, AutoTokenizer

from harness.flags import parse
from harness.train import main
from tests.support.images import SHAPES, draw, save_image_processor
from tests.support.inputs import SENTENCES, save_bert_tokenizer, save_gpt_tokenizer

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
# What stands in for model and data, and the metric that decides. The label of a text is its last word.
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


# Turned by an even number, so that both texts of a pair end with the word that the label stands for.
PAIRS = {"sentence1": TEXTS, "sentence2": TEXTS[2:] + TEXTS[:2]}
STAND_INS: dict[str, tuple[str, Callable[[], Dataset], str]] = {
    "beans_vit": ("vit", leaves, "eval_accuracy"),
    "cola": ("bert", lambda: labelled(["unacceptable", "acceptable"], sentence=TEXTS), "eval_matthews_correlation"),
    "conll_ner": ("bert", words, "eval_f1"),
    "distilbert_glue": ("distilbert", lambda: labelled(["not_equivalent", "equivalent"], **PAIRS), "eval_loss"),
    "early_stopping": ("bert", lambda: labelled(["not_equivalent", "equivalent"], **PAIRS), "eval_loss"),
    "gpt2_short_texts": ("gpt2", lambda: labelled(["negative", "positive"], text=TEXTS), "eval_loss"),
    "imdb_distilbert": ("distilbert", lambda: labelled(["neg", "pos"], text=TEXTS), "eval_accuracy"),
    "imdb_lora": ("distilbert", lambda: labelled(["neg", "pos"], text=TEXTS), "eval_accuracy"),
    "rte": ("bert", lambda: labelled(["entailment", "not_entailment"], **PAIRS), "eval_accuracy"),
}


def save_model(model_type: str, folder: Path) -> Path:
    """A tiny model with its tokenizer or image processor, as from_pretrained has them from the Hub; always the same."""
    shape: dict[str, Any] = dict(TINY[model_type])
    if model_type == "vit":
        save_image_processor(folder)
    else:
        (save_gpt_tokenizer if model_type == "gpt2" else save_bert_tokenizer)(folder)
        shape["vocab_size"] = len(AutoTokenizer.from_pretrained(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.for_model(model_type, **shape)).save_pretrained(folder)
    return folder


def flags_of(name: str, folder: Path, splits: dict[str, Dataset] | None = None) -> dict[str, Any]:
    """Make a recipe's stand-ins: 32 rows, or others, that have the Hub's columns and splits; returns their flags."""
    model_type, rows, _ = STAND_INS[name]
    held = parse(["--config", name]).task.validation_split_name or "validation"
    DatasetDict(splits or {"train": rows(), held: rows().select(range(8))}).save_to_disk(folder / "data")
    return {"model_name_or_path": save_model(model_type, folder / "model"), "dataset_name": folder / "data"}


def train(name: str, folder: Path, **flags: Any) -> dict[str, Any]:
    """The state that a run of the recipe ends with; a list is several values."""
    argv = ["--config", name]
    for flag, value in {"report_to": "none", **flags}.items():
        argv += [f"--{flag}", *map(str, value)] if isinstance(value, list) else [f"--{flag}={value}"]
    assert main([*argv, f"--output_dir={folder / 'run'}", "--use_cpu"]) == 0
    state: dict[str, Any] = json.loads((folder / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    return state


def run_recipe(name: str, folder: Path, **changed: Any) -> dict[str, Any]:
    """The state that a run of the recipe on its stand-ins ends with."""
    return train(name, folder, **{**flags_of(name, folder), **changed})
