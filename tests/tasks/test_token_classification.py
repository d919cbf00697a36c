"""Labels of words: where they stand, seqeval's numbers from counts, and a model that learns them."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import seqeval.metrics
import torch
from transformers import Trainer, TrainingArguments, set_seed

from harness.errors import ConfigError
from harness.tasks import Task, TaskConfig
from harness.tasks.scores.entities import EntityScores
from harness.tasks.text import token_classification as ner
from harness.train import main
from tests.support.inputs import TINY_BERT, TINY_GPT, save_bert_tokenizer, save_gpt_tokenizer
from tests.support.launching import ROOT, SCRIPT, run

DDP = ROOT / "launch_configs" / "ddp.yaml"
TAGS = ["B-PET", "B-PLACE", "I-PET", "O"]


def rows_of(count: int) -> list[dict[str, list[str]]]:
    """A pet of two words and a place in each; `catdog` is of several tokens."""
    pets, places = (("old", "cat"), ("red", "dog"), ("old", "catdog")), ("mat", "hill")
    texts = [["the", *pets[i % 3], "sat", "on", "the", places[i % 2]] for i in range(count)]
    return [{"tokens": words, "ner_tags": ["O", "B-PET", "I-PET", "O", "O", "O", "B-PLACE"]} for words in texts]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_bert_tokenizer(tmp_path_factory.mktemp("bert")))


@pytest.fixture
def given(tmp_path: Path, tokenizer: str) -> dict[str, Any]:
    path = write(tmp_path / "train.jsonl", rows_of(40))
    return {
        "task": "token-classification",
        "model_type": "bert",
        "config_overrides": TINY_BERT,
        "tokenizer_name": tokenizer,
        "train_file": path,
        "validation_file": path,
    }


def built(given: dict[str, Any], **changes: Any) -> Task:
    return ner.build(TaskConfig(**{**given, **changes}))


def shown(task: Task, index: int) -> list[tuple[str, str]]:
    """Each token with its label; "" is none."""
    sample = task.train_dataset[index]
    tokens = task.processing_class.convert_ids_to_tokens(sample["input_ids"])
    names = task.model.config.id2label
    return [(token, names.get(label, "")) for token, label in zip(tokens, sample["labels"], strict=True)]


class TestSamples:
    def test_the_first_token_of_a_word_has_its_label(self, given: dict[str, Any]) -> None:
        task = built(given)
        assert list(task.model.config.label2id) == TAGS
        assert [label for _, label in shown(task, 0)] == ["", "O", "B-PET", "I-PET", "O", "O", "O", "B-PLACE", ""]
        parts = shown(task, 2)[3:-5]
        assert "".join(token.removeprefix("##") for token, _ in parts) == "catdog"
        assert [label for _, label in parts] == ["I-PET", *[""] * (len(parts) - 1)]
        assert len(parts) > 1

    def test_all_tokens_of_a_word_are_labelled_if_asked_for(self, given: dict[str, Any], tmp_path: Path) -> None:
        rows = [{"tokens": ["catdog", "catdog"], "ner_tags": ["B-PET", "B-PLACE"]}, *rows_of(1)]
        path = write(tmp_path / "a.jsonl", rows)
        labels = [label for _, label in shown(built(given, train_file=path, label_all_tokens=True), 0)]
        half = len(labels) // 2
        # There is an I-PET to go on with, and no I-PLACE.
        assert labels == ["", "B-PET", *["I-PET"] * (half - 2), *["B-PLACE"] * (half - 1), ""]

    def test_longer_texts_are_cut_and_shorter_ones_padded(self, given: dict[str, Any]) -> None:
        task = built(given, max_seq_length=5, pad_to_max_length=True)
        assert {len(sample["labels"]) for sample in task.train_dataset} == {5}
        task = built(given, max_seq_length=20, pad_to_max_length=True)
        assert [label for _, label in shown(task, 0)][8:] == [""] * 12
        batch = built(given).data_collator([task.train_dataset[0], built(given).train_dataset[0]])
        assert batch["labels"].shape == batch["input_ids"].shape == (2, 20)

    def test_a_second_build_prepares_nothing_anew(self, given: dict[str, Any]) -> None:
        first, second = (built(given, label_all_tokens=True) for _ in range(2))
        assert first.train_dataset.cache_files == second.train_dataset.cache_files

    def test_names_of_a_data_set_on_the_hub_are_those_of_its_feature(
        self, given: dict[str, Any], tmp_path: Path
    ) -> None:
        names = datasets.ClassLabel(names=["O", "B-PET", "I-PET", "B-PLACE"])
        features = datasets.Features(
            {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)}
        )
        rows = [{**row, "ner_tags": names.str2int(row["ner_tags"])} for row in rows_of(8)]
        parts = datasets.DatasetDict(train=datasets.Dataset.from_list(rows, features=features))
        parts.save_to_disk(tmp_path / "saved")
        files = {"train_file": None, "validation_file": None, "dataset_name": str(tmp_path / "saved")}
        task = built(given, **files, validation_split_percentage=25)
        assert list(task.model.config.label2id) == names.names
        assert (len(task.train_dataset), len(task.eval_dataset)) == (6, 2)
        assert [label for _, label in shown(task, 0)][1:4] == ["O", "B-PET", "I-PET"]

    def test_a_stream_gives_the_same_samples(self, given: dict[str, Any]) -> None:
        whole, stream = (built(given, streaming=value, max_train_samples=5) for value in (False, True))
        assert [dict(sample) for sample in stream.train_dataset] == [dict(sample) for sample in whole.train_dataset]

    def test_the_order_of_a_pretrained_models_labels_is_kept(self, given: dict[str, Any], tmp_path: Path) -> None:
        task = built(given)
        labels = shown(task, 0)
        task.model.config.id2label = dict(enumerate(reversed(TAGS)))
        task.model.config.label2id = {name: index for index, name in task.model.config.id2label.items()}
        task.model.save_pretrained(tmp_path / "model")
        again = built(given, model_type=None, config_overrides=None, model_name_or_path=str(tmp_path / "model"))
        assert list(again.model.config.label2id) == TAGS[::-1]
        assert shown(again, 0) == labels

    def test_a_byte_level_tokenizer_puts_a_space_before_each_word(self, given: dict[str, Any], tmp_path: Path) -> None:
        from transformers import AutoTokenizer, GPT2Tokenizer

        raw = AutoTokenizer.from_pretrained(save_gpt_tokenizer(tmp_path / "raw"))
        model = json.loads(raw.backend_tokenizer.to_str())["model"]
        gpt = GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
        gpt.pad_token = gpt.eos_token
        gpt.save_pretrained(tmp_path / "gpt")
        changes = {"model_type": "gpt2", "config_overrides": TINY_GPT, "tokenizer_name": str(tmp_path / "gpt")}
        task = built(given, **changes)
        assert task.processing_class.decode(task.train_dataset[0]["input_ids"]) == " the old cat sat on the mat"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"text_column_names": "words"}, ["--text_column_names", "'words'", "tokens, ner_tags"]),
        ({"text_column_names": "tokens,ner_tags"}, ["--text_column_names=tokens,ner_tags", "one column"]),
        ({"label_column_name": "tags"}, ["--label_column_name", "'tags'", "tokens, ner_tags"]),
        ({"text_column_names": "text"}, ["'text'", "no lists of words", "jsonl"]),
        ({"label_column_name": "label"}, ["'label'", "no lists of labels", "--label_column_name"]),
        ({"label_column_name": "few"}, ["2 words and 1 labels", "give each word a label"]),
        ({"max_seq_length": 65}, ["--max_seq_length=65", "64 or less"]),
        ({"train_file": None}, ["No training data", "--train_file"]),
    ],
)
def test_bad_input_is_refused_with_what_to_do(
    changes: dict[str, Any], parts: list[str], given: dict[str, Any], tmp_path: Path
) -> None:
    row = {"tokens": ["a", "cat"], "ner_tags": ["O", "B-PET"], "text": "a cat", "label": "x", "few": ["O"]}
    path = write(tmp_path / "odd.jsonl", [row, {**row, "few": ["B-PET"]}] * 2)
    if "few" not in changes.values() and "label" not in changes.values() and "text" not in changes.values():
        path = given["train_file"]
    with pytest.raises(ConfigError) as error:
        built(given, **{"train_file": path, "validation_file": path, **changes})
    for part in parts:
        assert part in str(error.value)


def test_a_tag_that_no_training_sample_has_is_named(given: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "v.jsonl", [{"tokens": ["cow"], "ner_tags": ["B-COW"]}])
    with pytest.raises(ConfigError, match=r"--validation_file=.*v\.jsonl.*'B-COW'.*B-PET"):
        built(given, validation_file=path)


@pytest.mark.parametrize("words", [None, ["a", None]], ids=["no words", "a word that is none"])
def test_a_row_without_words_is_named(words: Any, given: dict[str, Any], tmp_path: Path) -> None:
    rows = [*rows_of(2), {"tokens": words, "ner_tags": ["O", "O"]}]
    with pytest.raises(ConfigError, match=r"--train_file=.*v\.jsonl has a row whose words are no texts"):
        built(given, train_file=write(tmp_path / "v.jsonl", rows))


def test_the_flag_is_refused_where_no_task_reads_it() -> None:
    with pytest.raises(ConfigError, match=r"--label_all_tokens=True is of --task token-classification.*leave it out"):
        TaskConfig(task="masked-lm", label_all_tokens=True)
    assert TaskConfig(task="own.module:build", label_all_tokens=True).label_all_tokens


class TestScores:
    @pytest.mark.parametrize("scheme", ["BI", "I", "BIES", "BIO without types"])
    @pytest.mark.parametrize("seed", range(5))
    def test_they_equal_seqeval(self, scheme: str, seed: int) -> None:
        """Tags drawn at random break every rule of their scheme."""
        types = [""] if "without" in scheme else ["-PER", "-LOC", "-B-1"]
        tags = ["O", *(f"{kind}{name}" for kind in scheme.partition("O")[0] for name in types)]
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, len(tags), (30, 12), generator=generator)
        logits = torch.randn(30, 12, len(tags), generator=generator)
        logits += 4 * torch.nn.functional.one_hot(labels, len(tags)) * (torch.rand(30, 1, 1, generator=generator) > 0.3)
        labels[torch.rand(30, 12, generator=generator) < 0.2] = -100
        labels[::7] = -100
        score = EntityScores(tags)
        predicted = score.predictions((logits, None), labels)
        for start in range(0, 30, 7):
            score.update(predicted[start : start + 7], labels[start : start + 7])
        true, guessed = (
            [[tags[i] for i in row[kept].tolist()] for row, kept in zip(ids, labels != -100, strict=True)]
            for ids in (labels, predicted)
        )
        names = ("precision", "recall", "f1", "accuracy")
        expected = {name: float(getattr(seqeval.metrics, f"{name}_score")(true, guessed)) for name in names}
        assert 0.05 < expected["f1"] < 0.95
        values = score.compute()
        assert tuple(values) == score.names == names
        assert values == pytest.approx(expected, rel=1e-12)

    def test_by_hand(self) -> None:
        """One entity right, one with a wrong end, one of the wrong type, one made up."""
        tags = ["O", "B-A", "I-A", "B-B", "I-B"]
        labels = torch.tensor([[1, 2, 0, 1, 2, 0, -100], [0, 1, 0, 0, 0, -100, -100]])
        predicted = torch.tensor([[1, 2, 0, 1, 0, 0, 3], [0, 3, 0, 1, 0, 4, 4]])
        score = EntityScores(tags)
        score.update(predicted, labels)
        values = score.compute()
        assert values == pytest.approx({"precision": 1 / 4, "recall": 1 / 3, "f1": 2 / 7, "accuracy": 8 / 11})

    def test_entities_do_not_run_on_into_the_next_text(self) -> None:
        score = EntityScores(["O", "B-A", "I-A"])
        score.update(torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0, 1], [2, 0]]))
        assert score._counts is not None
        assert score._counts.tolist() == [2, 2, 2, 4, 4]

    def test_without_entities_they_are_zero_and_without_tokens_nan(self) -> None:
        score = EntityScores(["O", "B-A"])
        assert all(math.isnan(value) for value in score.compute().values())
        score.update(torch.full((1, 3), 0), torch.full((1, 3), -100))
        assert all(math.isnan(value) for value in score.compute().values())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            score.update(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
            assert score.compute() == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1.0}

    def test_memory_does_not_grow(self) -> None:
        score = EntityScores(["O", "B-A"])
        for _ in range(3):
            score.update(torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.long))
        assert score._counts is not None
        assert score._counts.tolist() == [24, 24, 24, 24, 24]


class TestPredictions:
    def test_a_line_has_a_label_for_each_word(self, given: dict[str, Any], tmp_path: Path) -> None:
        rows = [{"tokens": row["tokens"]} for row in rows_of(3)]
        task = built(given, test_file=write(tmp_path / "t.jsonl", rows))
        assert "labels" not in task.test_dataset.column_names
        longest = max(len(sample["input_ids"]) for sample in task.test_dataset)
        predictions = np.full((3, longest), 3)
        predictions[0, 1:4] = [3, 0, 2]
        predictions[2, 3] = 2  # of the first token of catdog
        predictions[2, 4] = 0  # and of its second, which says nothing
        assert task.describe_predictions is not None
        assert task.describe_predictions(predictions) == ["O B-PET I-PET O O O O", "O " * 6 + "O", "O O I-PET O O O O"]

    def test_a_table_has_the_labels_of_the_words(self, given: dict[str, Any]) -> None:
        task = built(given)
        task.model.eval()
        assert task.predict_samples is not None
        with torch.no_grad():
            table = task.predict_samples(task.model, [task.eval_dataset[i] for i in range(10)])
        assert table.columns == ("inputs", "labels", "predictions")
        assert table.rows[0][:2] == ["the old cat sat on the mat", "O B-PET I-PET O O O B-PLACE"]
        assert all(len(str(row[2]).split()) == 7 for row in table.rows)


def test_a_model_learns_the_labels_and_predicts_them(given: dict[str, Any], tmp_path: Path) -> None:
    unlabelled = [{"tokens": row["tokens"]} for row in rows_of(5)]
    given = {**given, "test_file": write(tmp_path / "t.jsonl", unlabelled), "output_dir": str(tmp_path / "out")}
    argv = [f"--{name}={value}" for name, value in given.items()]
    argv += ["--num_train_epochs=12", "--learning_rate=1e-2", "--lr_scheduler_type=constant", "--eval_strategy=epoch"]
    argv += ["--save_strategy=epoch", "--save_total_limit=1", "--metric_for_best_model=f1", "--load_best_model_at_end"]
    assert main([*argv, "--do_train", "--do_eval", "--do_predict", "--report_to=none", "--use_cpu"]) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text(encoding="utf-8"))
    assert results["eval_f1"] > 0.9
    assert {f"eval_{name}" for name in ("precision", "recall", "f1", "accuracy")} <= set(results)
    lines = (tmp_path / "out" / "predict_results.txt").read_text(encoding="utf-8").splitlines()
    right = [" ".join(row["ner_tags"]) for row in rows_of(5)]
    assert sum(line == expected for line, expected in zip(lines, right, strict=True)) >= 4


@pytest.mark.slow
def test_two_processes_score_as_one(given: dict[str, Any], tmp_path: Path) -> None:
    """Ten texts in batches of four: the last are filled up, and the ranks' batches differ in length."""
    given = {**given, "test_file": write(tmp_path / "t.jsonl", rows_of(10)), "report_to": "none"}
    flags = [f"--{name}={value}" for name, value in given.items()]
    steps = ["--max_steps=3", "--learning_rate=4e-3", "--save_strategy=no", f"--output_dir={tmp_path / 'model'}"]
    assert main([*flags, *steps, "--use_cpu"]) == 0
    flags = [flag for flag in flags if not flag.startswith(("--model_type", "--config_overrides", "--tokenizer_name"))]
    flags += [f"--model_name_or_path={tmp_path / 'model'}", "--per_device_eval_batch_size=4", "--use_cpu"]
    results = []
    for count in (1, 2):
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(DDP)]
        argv = [*flags, "--do_predict", f"--expect_num_processes={count}", f"--output_dir={tmp_path / str(count)}"]
        done = run([*launch, "--num_processes", str(count), SCRIPT, *argv])
        assert done.code == 0, done.err
        lines = (tmp_path / str(count) / "predict_results.txt").read_text(encoding="utf-8")
        results.append((json.loads((tmp_path / str(count) / "all_results.json").read_text(encoding="utf-8")), lines))
    (one, lines), (two, their_lines) = results
    assert lines == their_lines
    for name in ("precision", "recall", "f1", "accuracy"):
        assert two[f"test_{name}"] == one[f"test_{name}"]


def test_a_training_equals_the_trainers_with_seqeval(given: dict[str, Any], tmp_path: Path) -> None:
    """As run_ner does it: all predictions at once, as lists of tags, into seqeval."""
    rows = rows_of(40)
    for row in rows[::3]:  # not to be learnt: some scores stay between nothing and all
        row["ner_tags"] = ["B-PET", "I-PET", "O", "O", "I-PET", "B-PLACE", "O"]
    given = {**given, "train_file": write(tmp_path / "odd.jsonl", rows)}
    steps = {"max_steps": 12, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no"}
    steps |= {"learning_rate": 4e-3, "per_device_eval_batch_size": 16, "report_to": "none"}
    argv = [f"--{name}={value}" for name, value in {**given, **steps, "output_dir": tmp_path / "ours"}.items()]
    assert main([*argv, "--label_all_tokens", "--loss_scaling=trainer", "--use_cpu"]) == 0
    ours = json.loads((tmp_path / "ours" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    set_seed(42)
    task = built(given, label_all_tokens=True)
    names = list(task.model.config.label2id)

    def scores(outcome: Any) -> dict[str, float]:
        kept = outcome.label_ids != -100
        tags = [
            [[names[i] for i in row[mask]] for row, mask in zip(ids, kept, strict=True)]
            for ids in (outcome.label_ids, outcome.predictions.argmax(axis=-1))
        ]
        each = ("precision", "recall", "f1", "accuracy")
        return {name: float(getattr(seqeval.metrics, f"{name}_score")(*tags)) for name in each}

    trainer = Trainer(
        task.model,
        TrainingArguments(output_dir=str(tmp_path / "theirs"), use_cpu=True, **steps),
        data_collator=task.data_collator,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
        processing_class=task.processing_class,
        compute_metrics=scores,
    )
    trainer.train()
    names = ["loss", "grad_norm", *(f"eval_{name}" for name in ("loss", "precision", "recall", "f1", "accuracy"))]
    found, expected = (
        [{name: entry[name] for name in names if name in entry} for entry in history]
        for history in (ours, trainer.state.log_history)
    )
    assert any(0.05 < entry.get("eval_f1", 0) < 0.95 for entry in found)
    assert found == [pytest.approx(entry, rel=1e-12) for entry in expected]
