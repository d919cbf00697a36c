"""Labels, tags and texts of every type: understood as they stand, or refused in a line."""

from __future__ import annotations

import decimal
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel

from harness.errors import ConfigError
from harness.tasks import Task, TaskConfig, resolve
from harness.tasks.labels import MULTI, REGRESSION, SINGLE
from harness.tasks.scores.classification import TokenAccuracy
from harness.tasks.scores.entities import EntityScores
from tests.support.inputs import TINY_BERT, TINY_GPT, save_bert_tokenizer, save_gpt_tokenizer

TEXTS = ["the old cat", "the red dog", "a cat", "a dog"]
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_bert_tokenizer(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer that adds no tokens of its own, with a padding token."""
    folder = save_gpt_tokenizer(tmp_path_factory.mktemp("gpt"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "<|end|>"}))
    return str(folder)


def save_head(folder: Path, tokenizer: str, model: Any = BertForSequenceClassification, **config: Any) -> str:
    shape = dict(pair.split("=") for pair in TINY_BERT.split(","))
    made = model(BertConfig(vocab_size=200, **{name: int(size) for name, size in shape.items()}, **config))
    made.save_pretrained(folder)
    for file in Path(tokenizer).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


@pytest.fixture(scope="module")
def model(bert: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_head(tmp_path_factory.mktemp("nli"), bert, id2label=NLI)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        names = list(rows[0])
        path.write_text("\n".join([",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]))
    return str(path)


def labelled(path: Path, labels: list[Any]) -> str:
    rows = [{"text": TEXTS[at % len(TEXTS)], "label": label} for at, label in enumerate(labels)]
    return write(path, rows)


def built(bert: str, train: str, valid: str | None = None, task: str = "sequence-classification", **flags: Any) -> Task:
    given: dict[str, Any] = {"task": task, "train_file": train, "validation_file": valid, **flags}
    if "model_name_or_path" not in flags:
        given = {"model_type": "bert", "config_overrides": TINY_BERT, "tokenizer_name": bert, **given}
    return resolve(task)(TaskConfig(**given))


def names(task: Task) -> list[str]:
    return [task.model.config.id2label[at] for at in range(task.model.config.num_labels)]


def ids(rows: Any) -> list[Any]:
    return [row["label"] for row in rows]


class TestKinds:
    """One kind and one set of names, found once for all parts of the data."""

    @pytest.mark.parametrize("suffix", ["csv", "jsonl"])
    def test_words_that_look_like_values_are_classes(self, bert: str, tmp_path: Path, suffix: str) -> None:
        labels = ["NA", "null", "nan", "None"]
        train = labelled(tmp_path / f"t.{suffix}", labels)
        task = built(bert, train, labelled(tmp_path / f"v.{suffix}", ["nan"] * 2))
        assert names(task) == sorted(labels)
        assert ids(task.eval_dataset) == [2, 2]

    def test_true_and_false_are_the_same_in_every_format_and_part(self, bert: str, tmp_path: Path) -> None:
        train = labelled(tmp_path / "t.csv", ["true", "false", "unknown"])
        task = built(bert, train, labelled(tmp_path / "v.csv", ["true", "false"]))
        assert (names(task), ids(task.eval_dataset)) == (["false", "true", "unknown"], [1, 0])
        task = built(bert, labelled(tmp_path / "t.jsonl", [True, False]), labelled(tmp_path / "w.csv", ["true"] * 2))
        assert (names(task), ids(task.eval_dataset)) == (["false", "true"], [1, 1])
        with pytest.raises(ConfigError, match="has the label 'unknown', which no training sample has"):
            built(bert, labelled(tmp_path / "u.csv", ["true", "false"]), labelled(tmp_path / "x.csv", ["unknown"]))

    def test_codes_with_leading_zeros_keep_them(self, bert: str, tmp_path: Path) -> None:
        train = labelled(tmp_path / "t.csv", ["01", "02", "0A"])
        task = built(bert, train, labelled(tmp_path / "v.csv", ["02", "01"]))
        assert (names(task), ids(task.eval_dataset)) == (["01", "02", "0A"], [1, 0])

    def test_whole_numbers_are_classes_in_their_order(self, bert: str, tmp_path: Path) -> None:
        task = built(bert, labelled(tmp_path / "t.csv", [10, 9, -1, 2]))
        assert names(task) == ["-1", "2", "9", "10"]

    @pytest.mark.parametrize("suffix", ["csv", "jsonl"])
    @pytest.mark.parametrize(
        ("train", "valid", "kind"),
        [
            ([0.5, 1.5], [1.0, 2.0], REGRESSION),
            ([1, 2, 3], [1.5, 2.0], REGRESSION),  # a score whose training part happens to be whole
            ([1, 2, 3], [1, 2], SINGLE),
        ],
    )
    def test_the_kind_is_that_of_all_parts(
        self, bert: str, tmp_path: Path, suffix: str, train: list[Any], valid: list[Any], kind: str
    ) -> None:
        task = built(bert, labelled(tmp_path / f"t.{suffix}", train), labelled(tmp_path / f"v.{suffix}", valid))
        assert task.model.config.problem_type == kind
        if kind == REGRESSION:
            assert ids(task.train_dataset) == [float(label) for label in train]
            assert ids(task.eval_dataset) == [float(label) for label in valid]

    def test_a_word_among_scores_is_refused(self, bert: str, tmp_path: Path) -> None:
        train = labelled(tmp_path / "t.csv", [0.5, 1.5])
        with pytest.raises(ConfigError, match="has 'n/a' in 'label', no number"):
            built(bert, train, labelled(tmp_path / "v.csv", [1.0, "n/a"]))

    def test_an_empty_cell_is_no_label(self, bert: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="has rows without a value in 'label'"):
            built(bert, labelled(tmp_path / "t.csv", ["cat", "", "dog"]))

    def test_streams_have_the_same_labels(self, bert: str, tmp_path: Path) -> None:
        train = labelled(tmp_path / "t.csv", ["01", "02", "NA", "02"])
        task = built(bert, train, labelled(tmp_path / "v.csv", ["NA"]), streaming=True)
        assert (names(task), ids(task.eval_dataset)) == (["01", "02", "NA"], [2])

    def test_an_id_column_is_not_taken_as_a_text(self, bert: str, tmp_path: Path) -> None:
        rows = [{"id": at, "body": text, "label": text[-3:]} for at, text in enumerate(TEXTS)]
        valid = write(tmp_path / "v.csv", rows[:2])
        task = built(bert, write(tmp_path / "t.csv", rows), valid)
        expected = [task.processing_class(text)["input_ids"] for text in TEXTS[:2]]
        assert [sample["input_ids"] for sample in task.eval_dataset] == expected


class TestOneHot:
    @pytest.mark.parametrize("one", [1.0, 1], ids=["floats", "whole numbers"])
    def test_rows_of_zeros_and_ones_have_a_label_each(self, bert: str, tmp_path: Path, one: Any) -> None:
        labels = [[one, one * 0, one], [one * 0, one * 0, one * 0], [one * 0, one, one * 0]]
        task = built(bert, labelled(tmp_path / "t.jsonl", labels), labelled(tmp_path / "v.jsonl", labels[:1]))
        assert (names(task), task.model.config.problem_type) == (["0", "1", "2"], MULTI)
        assert ids(task.train_dataset) == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
        assert ids(task.eval_dataset) == [[1.0, 0.0, 1.0]]

    def test_lists_of_ids_stay_lists_of_ids(self, bert: str, tmp_path: Path) -> None:
        rows = [[0, 2], [1], []]
        task = built(bert, labelled(tmp_path / "t.jsonl", rows), labelled(tmp_path / "v.jsonl", rows[:2]))
        assert names(task) == ["0", "1", "2"]
        assert ids(task.train_dataset) == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]

    @pytest.mark.parametrize(
        ("train", "valid", "expected"),
        [
            ([[1.0, 0.3], [0.0, 1.0]], None, "lists of numbers like"),
            ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0, 0.0]], "a 0 or 1 for each of 2 labels"),
            ([[1.0, 0.0], [0.0, 1.0]], [None], "has rows without a value"),
        ],
    )
    def test_what_is_neither_is_refused(
        self, bert: str, tmp_path: Path, train: list[Any], valid: list[Any] | None, expected: str
    ) -> None:
        second = None if valid is None else labelled(tmp_path / "v.jsonl", [*valid, train[0]])
        with pytest.raises(ConfigError, match=expected):
            built(bert, labelled(tmp_path / "t.jsonl", train), second)


class TestValues:
    """What is no text and no label is refused, in one line."""

    @pytest.mark.parametrize(
        "value",
        [
            [{"role": "user", "content": "hello"}],
            ["a", "b"],
            {"a": "b"},
            b"bytes",
            1.5,
            True,
            decimal.Decimal("1.50"),
        ],
        ids=["chat", "list", "mapping", "bytes", "float", "bool", "decimal"],
    )
    @pytest.mark.parametrize("task", ["causal-lm", "masked-lm", "sequence-classification", "seq2seq"])
    def test_a_text_is_a_text(self, bert: str, gpt: str, tmp_path: Path, task: str, value: Any) -> None:
        rows = [{"text": value, "label": label, "summary": "a cat"} for label in ("x", "y")]
        flags = {"text_column_names": "text"}
        if task == "causal-lm":
            flags |= {"model_type": "gpt2", "config_overrides": TINY_GPT, "tokenizer_name": gpt}
        if task == "seq2seq":
            flags |= {"model_type": "t5", "config_overrides": "d_model=16,d_ff=16,num_layers=1,num_heads=2"}
        with pytest.raises(ConfigError, match=r"Column 'text' holds .*where a text is needed") as error:
            built(bert, write(tmp_path / "t.parquet", rows), task=task, **flags)
        assert len(str(error.value).splitlines()) == 1

    def test_a_target_is_a_text(self, bert: str, tmp_path: Path) -> None:
        rows = [{"text": "a cat", "summary": ["a", "b"]}] * 2
        with pytest.raises(ConfigError, match="Column 'summary' holds"):
            built(
                bert,
                write(tmp_path / "t.parquet", rows),
                task="seq2seq",
                model_type="t5",
                config_overrides="d_model=16,d_ff=16,num_layers=1,num_heads=2",
            )

    @pytest.mark.parametrize(
        "value",
        [{"a": 1}, b"x", decimal.Decimal("1.50"), [["a"], ["b"]], [{"a": 1}]],
        ids=["mapping", "bytes", "decimal", "lists of lists", "mappings"],
    )
    def test_a_label_is_a_label(self, bert: str, tmp_path: Path, value: Any) -> None:
        with pytest.raises(ConfigError, match="a label is a text, a number or a list of them"):
            built(bert, labelled(tmp_path / "t.parquet", [value, value]))

    def test_a_text_without_a_token_is_refused(self, gpt: str, tmp_path: Path) -> None:
        rows = [{"text": text, "label": label} for text, label in (("a cat", "x"), ("", "y"))]
        flags = {"model_type": "gpt2", "config_overrides": TINY_GPT}
        with pytest.raises(ConfigError, match="a row whose text has no token"):
            built(gpt, write(tmp_path / "t.jsonl", rows), **flags)

    def test_a_row_without_words_is_refused(self, bert: str, tmp_path: Path) -> None:
        rows = [
            {"tokens": ["a"], "ner_tags": ["O"]},
            {"tokens": [], "ner_tags": []},
            {"tokens": ["b"], "ner_tags": ["X"]},
        ]
        with pytest.raises(ConfigError, match="has a row without words"):
            built(bert, write(tmp_path / "t.jsonl", rows), task="token-classification")

    def test_a_block_of_one_token_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="--block_size=1: use 2 or more"):
            TaskConfig(block_size=1)


class TestTags:
    def words(self, path: Path, *tags: list[Any]) -> str:
        return write(path, [{"tokens": ["the"] * len(row), "ner_tags": row} for row in tags])

    def test_numbers_of_no_names_are_scored_by_accuracy(self, bert: str, tmp_path: Path) -> None:
        task = built(bert, self.words(tmp_path / "t.jsonl", [0, 1, 2], [1, 0]), task="token-classification")
        assert names(task) == ["0", "1", "2"]
        assert task.metrics is not None
        score = task.metrics()
        assert isinstance(score, TokenAccuracy)
        labels = torch.tensor([[-100, 0, 1, 2, -100]])
        score.update(torch.tensor([[0, 0, 1, 1, 0]]), labels)
        assert score.compute() == {"accuracy": 2 / 3}

    def test_two_kinds_of_words_are_tags_and_no_flags(self, bert: str, tmp_path: Path) -> None:
        task = built(bert, self.words(tmp_path / "t.jsonl", [0, 1], [1, 1], [0, 0]), task="token-classification")
        assert names(task) == ["0", "1"]
        assert [[tag for tag in row["labels"] if tag >= 0] for row in task.train_dataset] == [[1, 1], [0, 0]]

    def test_names_of_entities_are_scored_by_entities(self, bert: str, tmp_path: Path) -> None:
        rows = self.words(tmp_path / "t.jsonl", ["O", "B-PER"], ["I-PER", "O"])
        task = built(bert, rows, task="token-classification")
        assert task.metrics is not None
        assert isinstance(task.metrics(), EntityScores)

    def test_numbers_are_the_ids_of_a_model_that_was_trained_for_tags(self, bert: str, tmp_path: Path) -> None:
        names_of = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
        model = save_head(tmp_path / "model", bert, BertForTokenClassification, id2label=names_of)
        rows = self.words(tmp_path / "t.jsonl", [0, 3], [3, 0])
        task = built(bert, rows, task="token-classification", model_name_or_path=model)
        assert names(task) == list(names_of.values())
        assert {tag for row in task.train_dataset for tag in row["labels"]} == {-100, 0, 3}
        assert task.metrics is not None
        assert isinstance(task.metrics(), EntityScores)

    def test_a_tag_with_a_fraction_is_refused(self, bert: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="a label is a text or a whole number"):
            built(bert, self.words(tmp_path / "t.jsonl", [0.5, 1.0]), task="token-classification")


class TestTrainedHeads:
    """Labels that a trained model knows keep its ids, and so its head."""

    def weights(self, model: str) -> torch.Tensor:
        return BertForSequenceClassification.from_pretrained(model).classifier.weight

    @pytest.mark.parametrize("suffix", ["csv", "jsonl"])
    @pytest.mark.parametrize(
        ("labels", "expected"),
        [
            (["entailment", "contradiction"], [2, 0]),
            (["neutral", "neutral", "entailment"], [1, 1, 2]),
            (["neutral"] * 2, [1, 1]),
            ([2, 0], [2, 0]),
            ([1, 2, 0], [1, 2, 0]),
        ],
    )
    def test_a_subset_keeps_ids_and_head(
        self, model: str, bert: str, tmp_path: Path, suffix: str, labels: list[Any], expected: list[int]
    ) -> None:
        train = labelled(tmp_path / f"t.{suffix}", labels)
        task = built(bert, train, labelled(tmp_path / f"v.{suffix}", labels), model_name_or_path=model)
        assert task.model.config.id2label == NLI
        assert ids(task.train_dataset) == ids(task.eval_dataset) == expected
        assert torch.equal(task.model.classifier.weight, self.weights(model))

    def test_a_class_label_keeps_ids_by_its_names(self, model: str, bert: str, tmp_path: Path) -> None:
        features = Features({"text": Value("string"), "label": ClassLabel(names=["entailment", "contradiction"])})
        rows = Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1]}, features=features)
        datasets.DatasetDict(train=rows, validation=rows).save_to_disk(str(tmp_path / "set"))
        task = resolve("sequence-classification")(
            TaskConfig(task="sequence-classification", dataset_name=str(tmp_path / "set"), model_name_or_path=model)
        )
        assert ids(task.train_dataset) == [2, 0, 2, 0]

    def test_flags_of_a_trained_head_have_its_names(self, model: str, bert: str, tmp_path: Path) -> None:
        train = labelled(tmp_path / "t.jsonl", [[1, 0, 1], [0, 0, 0]])
        task = built(bert, train, model_name_or_path=model)
        assert task.model.config.id2label == NLI

    def test_other_labels_of_another_number_say_what_the_remedy_costs(
        self, model: str, bert: str, tmp_path: Path
    ) -> None:
        train = labelled(tmp_path / "t.csv", ["neutral", "other"])
        with pytest.raises(ConfigError, match="makes these weights anew and loses what they have learnt"):
            built(bert, train, model_name_or_path=model)

    def test_a_model_without_a_head_has_the_names_of_the_data(self, bert: str, tmp_path: Path) -> None:
        base = save_head(tmp_path / "base", bert, BertModel)
        task = built(bert, labelled(tmp_path / "t.csv", [0, 1]), model_name_or_path=base)
        assert names(task) == ["0", "1"]

    @pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
    def test_a_single_class_is_refused(self, bert: str, tmp_path: Path, task: str) -> None:
        rows = [{"text": "a cat", "label": "x", "tokens": ["a"], "ner_tags": ["x"]}] * 3
        with pytest.raises(ConfigError, match="has no label but 'x'; a classifier needs two or more"):
            built(bert, write(tmp_path / "t.jsonl", rows), task=task)
