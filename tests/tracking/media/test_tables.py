"""Tables of predictions: their values by hand, when they come, and that a training does not feel them."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from harness.tasks import SamplePredictions, Task, TaskConfig
from harness.tasks.text import causal_lm, masked_lm
from harness.tasks.text import sequence_classification as classification
from harness.tracking.media.due import Evaluated, Every, is_due, last_evaluation
from harness.tracking.media.tables import SampleTables
from harness.training import rng
from tests.support.inputs import (
    SENTENCES,
    TINY_BERT,
    TINY_GPT,
    labelled,
    save_bert_tokenizer,
    save_gpt_tokenizer,
    write_rows,
    write_text,
)
from tests.support.launching import SCRIPT, run
from tests.support.parity import CHECKPOINTING, as_flags, assert_equal_runs, run_harness
from tests.support.wandb.file import WandbFile, read_all

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
TINY_DISTILBERT = "dim=16,n_layers=1,n_heads=2,hidden_dim=32,max_position_embeddings=64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def gpt(folder: Path) -> Task:
    tokenizer, text = save_gpt_tokenizer(folder / "gpt"), write_text(folder / "text.txt")
    files = {"train_file": str(text), "validation_file": str(text), "tokenizer_name": str(tokenizer)}
    return awake(causal_lm.build(TaskConfig(model_type="gpt2", config_overrides=TINY_GPT, block_size=16, **files)))


@pytest.fixture(scope="module")
def bert_tokenizer(folder: Path) -> str:
    return str(save_bert_tokenizer(folder / "bert"))


@pytest.fixture(scope="module")
def bert(folder: Path, bert_tokenizer: str) -> Task:
    text = str(write_text(folder / "lines.txt"))
    config = TaskConfig(
        task="masked-lm",
        model_type="bert",
        config_overrides=TINY_BERT,
        tokenizer_name=bert_tokenizer,
        train_file=text,
        validation_file=text,
        line_by_line=True,
    )
    return awake(masked_lm.build(config))


@pytest.fixture(scope="module")
def classifier(folder: Path, bert_tokenizer: str) -> Task:
    return classification_of(labelled(), folder / "labels.csv", bert_tokenizer)


def classification_of(rows: list[dict[str, Any]], path: Path, tokenizer: str, **changes: Any) -> Task:
    if path.suffix == ".csv":
        write_rows(path, rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = {"model_type": "bert", "config_overrides": TINY_BERT, **changes}
    files = {"train_file": str(path), "validation_file": str(path), "tokenizer_name": tokenizer}
    return awake(classification.build(TaskConfig(task="sequence-classification", **given, **files)))


def awake(task: Task) -> Task:
    """Weights so large that the model says something else to every text."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.normal_(std=0.6, generator=generator)
    return task


def predict(task: Task, samples: Sequence[Any]) -> SamplePredictions:
    assert task.predict_samples is not None
    task.model.eval()
    with torch.no_grad():
        return task.predict_samples(task.model, samples)


def columns(predictions: SamplePredictions) -> dict[str, list[Any]]:
    assert len(predictions.rows) > 0
    return dict(zip(predictions.columns, map(list, zip(*predictions.rows, strict=True)), strict=True))


def logits_alone(task: Task, sample: dict[str, Any], *names: str) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = task.model(**{name: torch.tensor([sample[name]]) for name in names}).logits
    return logits[0]


def eval_rows(task: Task, count: int) -> list[Any]:
    return [task.eval_dataset[i] for i in range(count)]


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The warnings of Transformers too: its logger does not propagate."""
    theirs = transformers_logging.get_logger("transformers")
    theirs.addHandler(caplog.handler)
    yield caplog
    theirs.removeHandler(caplog.handler)


class TestDue:
    @pytest.mark.parametrize(
        ("freq", "evaluated", "due"),
        [
            (2, [1, 2, 3, 4, 5, 6], [2, 4, 6]),
            (2, [0, 1, 2, 3, 4], [2, 4]),
            (2, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0], [2.0, 4.0]),
            (2, [1.7, 2.3, 2.9, 3.5, 4.1], [2.3, 4.1]),
            (1, [0, 1, 2, 3], [1, 2, 3]),
            (1, [0.25, 0.5, 0.75], []),
            (3, [5.0, 5.5, 6.0, 6.5], [5.0, 6.0]),
            (2, [7.0, 7.9, 8.0], [7.0, 8.0]),
            (2, [2.0, 2.0, 4.0], [2.0, 4.0]),  # the last step is an epoch's end too
            (2, [1.0, 1.9999999999, 2.5, 4.0000000001], [1.9999999999, 4.0000000001]),
            (2, [2.0000000001, 3.9999999999, 4.0], [2.0000000001, 3.9999999999]),
            (2, [0.0], []),
        ],
    )
    def test_first_evaluation_at_or_after_each_multiple(
        self, freq: int, evaluated: list[float], due: list[float]
    ) -> None:
        before = [None, *evaluated[:-1]]
        assert [at for at, last in zip(evaluated, before, strict=True) if is_due(at, last, freq)] == due

    def test_added_up_thirds_of_an_epoch_count_as_epochs(self) -> None:
        evaluated = np.cumsum([1 / 3] * 36).tolist()
        assert evaluated[17] != 6.0
        due = [i + 1 for i in range(36) if is_due(evaluated[i], evaluated[i - 1] if i else None, 2)]
        assert due == [6, 12, 18, 24, 30, 36]

    def test_history_of_a_checkpoint_says_when_the_last_evaluation_was(self) -> None:
        history: list[dict[str, Any]] = [{"loss": 1.0, "epoch": 0.5, "step": 1}]
        assert last_evaluation(history) is None
        history.append({"eval_cola_runtime": 1.0, "epoch": 1.0, "step": 2})
        assert last_evaluation([*history, {"loss": 0.5, "epoch": 1.5, "step": 3}]) == Evaluated(epoch=1.0, step=2)

    @pytest.mark.parametrize(
        ("often", "due"),
        [
            (Every(epochs=None, steps=25), [30, 50, 80, 100]),
            (Every(epochs=None, steps=10), [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
            (Every(epochs=None, steps=200), []),
            (Every(epochs=1), [40, 80]),
            (Every(epochs=2, steps=60), [60, 80]),
        ],
    )
    def test_tables_are_due_by_steps_by_epochs_or_by_both(self, often: Every, due: list[int]) -> None:
        made = [Evaluated(epoch=step / 40, step=step) for step in [0, *range(10, 101, 10), 100]]
        found = [n for n, last in zip(made, [None, *made[:-1]], strict=True) if often.is_due(n.epoch, n.step, last)]
        assert [now.step for now in found] == due


LENGTHS = (16, 9, 5, 12, 16, 3, 7, 10, 16, 2, 1)


@pytest.fixture(scope="module")
def samples(gpt: Task) -> list[dict[str, Any]]:
    rows = eval_rows(gpt, len(LENGTHS))
    return [{"input_ids": row["input_ids"][:length]} for row, length in zip(rows, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def table(gpt: Task, samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return columns(predict(gpt, samples))


class TestCausalLm:
    def test_text_is_cut_into_prompt_and_label(
        self, gpt: Task, samples: list[dict[str, Any]], table: dict[str, list[Any]]
    ) -> None:
        assert list(table) == ["inputs", "labels", "predictions"]
        for sample, start, rest in zip(samples, table["inputs"], table["labels"], strict=True):
            ids, half = sample["input_ids"], max(1, len(sample["input_ids"]) // 2)
            assert start == gpt.processing_class.decode(ids[:half])
            assert rest == gpt.processing_class.decode(ids[half:])

    def test_prediction_is_the_argmax_of_each_text_alone(
        self, gpt: Task, samples: list[dict[str, Any]], table: dict[str, list[Any]]
    ) -> None:
        assert len(set(table["predictions"])) > 5
        for sample, found in zip(samples, table["predictions"], strict=True):
            ids = sample["input_ids"][: max(1, len(sample["input_ids"]) // 2)]
            new: list[int] = []
            while len(ids) + len(new) < len(sample["input_ids"]):
                new.append(int(logits_alone(gpt, {"input_ids": ids + new}, "input_ids")[-1].argmax()))
                if new[-1] == gpt.processing_class.eos_token_id:
                    break
            assert found == gpt.processing_class.decode(new, skip_special_tokens=True)

    def test_prediction_is_that_of_generate_for_each_text_alone(
        self, gpt: Task, samples: list[dict[str, Any]], table: dict[str, list[Any]]
    ) -> None:
        for sample, found in zip(samples[:8], table["predictions"], strict=False):
            ids = torch.tensor([sample["input_ids"][: len(sample["input_ids"]) // 2]])
            output = gpt.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=len(sample["input_ids"]) - ids.shape[1],
                pad_token_id=0,
            )[0]
            assert found == gpt.processing_class.decode(output[ids.shape[1] :], skip_special_tokens=True)

    def test_settings_for_sampling_change_nothing_and_warn_of_nothing(
        self, gpt: Task, samples: list[dict[str, Any]], table: dict[str, list[Any]], heard: pytest.LogCaptureFixture
    ) -> None:
        settings: Any = gpt.model.generation_config
        was = dict(vars(settings))
        vars(settings).update(do_sample=True, temperature=0.3, top_k=3, top_p=0.5, max_length=5, num_beams=3)
        given = dict(vars(settings))
        try:
            assert columns(predict(gpt, samples)) == table
            assert vars(settings) == given
        finally:
            vars(settings).update(was)
        assert heard.records == []

    def test_end_of_the_text_ends_the_prediction(self, gpt: Task, samples: list[dict[str, Any]]) -> None:
        end = gpt.processing_class.eos_token_id
        bias = torch.nn.Parameter(torch.zeros(len(gpt.processing_class)))
        with torch.no_grad():
            bias[end] = 1e6
        head: Any = gpt.model.lm_head
        was, head.bias = head.bias, bias
        try:
            assert set(columns(predict(gpt, samples))["predictions"]) == {""}
        finally:
            head.bias = was

    def test_long_samples_show_their_start(self, gpt: Task) -> None:
        long = awake(replace(gpt, model=type(gpt.model)(changed(gpt.model.config, n_positions=256))))
        sample = {"input_ids": [ids for row in eval_rows(gpt, 12) for ids in row["input_ids"]]}
        (row,) = predict(long, [sample]).rows
        decode = gpt.processing_class.decode
        assert row[0] == decode(sample["input_ids"][:64])
        assert row[1] == decode(sample["input_ids"][64:96])


def changed(config: Any, **values: Any) -> Any:
    return type(config)(**{**config.to_dict(), **values})


class TestMaskedLm:
    def test_gaps_are_filled_as_for_each_text_alone(self, bert: Task) -> None:
        samples, tokenizer = eval_rows(bert, 11), bert.processing_class
        table = columns(predict(bert, samples))
        assert list(table) == ["inputs", "labels", "predictions"]
        changes = 0
        for i, sample in enumerate(samples):
            text = tokenizer.decode(sample["input_ids"], skip_special_tokens=True)
            assert table["labels"][i] == text
            words = table["inputs"][i].split()
            # 15 % of seven words are one; whole words are single tokens here.
            assert words.count("[MASK]") == 1
            ids = [tokenizer.cls_token_id, *tokenizer.convert_tokens_to_ids(words), tokenizer.sep_token_id]
            assert len(ids) == len(sample["input_ids"])
            gap = words.index("[MASK]") + 1
            guess = int(logits_alone(bert, {"input_ids": ids}, "input_ids")[gap].argmax())
            filled = [*sample["input_ids"][1:gap], guess, *sample["input_ids"][gap + 1 : -1]]
            assert table["predictions"][i] == tokenizer.decode(filled)
            changes += table["predictions"][i] != text
        assert changes > 0
        assert len({tuple(text.split()) for text in table["predictions"]}) > 2

    def test_mask_is_the_same_each_time_and_of_the_share(self, bert: Task) -> None:
        sample = {"input_ids": [ids for row in eval_rows(bert, 6) for ids in row["input_ids"][1:-1]]}
        assert bert.predict_samples is not None
        half = bert.predict_samples.func  # type: ignore[attr-defined]
        tables = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            with torch.no_grad():
                tables.append(half(bert.model, [sample], tokenizer=bert.processing_class, mlm_probability=0.5))
        assert tables[0] == tables[1]
        words = tables[0].rows[0][0].split()
        assert words.count("[MASK]") == len(words) // 2 == len(sample["input_ids"]) // 2

    def test_padding_and_special_tokens_are_neither_hidden_nor_shown(self, bert: Task) -> None:
        tokenizer = bert.processing_class
        encoded = tokenizer(["the cat", ""], padding="max_length", max_length=12, return_special_tokens_mask=True)
        samples = [{name: values[i] for name, values in encoded.items()} for i in range(2)]
        short, empty = predict(bert, samples).rows
        assert short[1] == "the cat"
        assert sorted(short[0].split()) in (["[MASK]", "cat"], ["[MASK]", "the"])  # type: ignore[union-attr]
        assert empty == ["", "", ""]


class TestSequenceClassification:
    def test_probabilities_are_the_softmax_of_each_text_alone(self, classifier: Task) -> None:
        samples = eval_rows(classifier, 8)
        found = predict(classifier, samples)
        table = columns(found)
        assert list(table) == ["inputs", "labels", "predictions", "probability"]
        assert found.class_names == ("cat", "dog")
        assert found.probabilities is not None
        for i, sample in enumerate(samples):
            own = logits_alone(classifier, sample, "input_ids", "attention_mask").softmax(-1)
            assert found.probabilities[i] == pytest.approx(own.tolist(), abs=1e-5)
            assert table["inputs"][i] == SENTENCES[i]
            assert table["labels"][i] == ("cat" if "cat" in SENTENCES[i] else "dog")
            assert table["predictions"][i] == ("cat", "dog")[int(own.argmax())]
            assert table["probability"][i] == pytest.approx(float(own.max()), abs=1e-5)
        assert found.labels == [sample["label"] for sample in samples]
        assert len(set(table["probability"])) > 4

    def test_keys_that_the_model_does_not_take_stay_out(self, folder: Path, bert_tokenizer: str) -> None:
        task = classification_of(
            labelled(),
            folder / "distil.csv",
            bert_tokenizer,
            model_type="distilbert",
            config_overrides=TINY_DISTILBERT,
        )
        samples = [{**sample, "token_type_ids": [0] * len(sample["input_ids"])} for sample in eval_rows(task, 3)]
        found = predict(task, samples)
        assert found.probabilities is not None
        own = logits_alone(task, samples[2], "input_ids", "attention_mask").softmax(-1)
        assert found.probabilities[2] == pytest.approx(own.tolist(), abs=1e-5)

    def test_regression_shows_numbers(self, folder: Path, bert_tokenizer: str) -> None:
        rows = [{"text": text, "label": i / 2} for i, text in enumerate(SENTENCES)]
        task = classification_of(rows, folder / "numbers.csv", bert_tokenizer)
        samples = eval_rows(task, 5)
        found = predict(task, samples)
        table = columns(found)
        own = [float(logits_alone(task, sample, "input_ids", "attention_mask")) for sample in samples]
        assert table["labels"] == [0.0, 0.5, 1.0, 1.5, 2.0]
        assert table["predictions"] == pytest.approx(own, abs=1e-5)
        assert found.class_names is found.labels is found.probabilities is None

    def test_several_labels_are_listed(self, folder: Path, bert_tokenizer: str) -> None:
        kinds = ("cat", "dog", "mat")
        rows = [{"text": text, "label": [kind for kind in kinds if kind in text]} for text in SENTENCES]
        task = classification_of(rows, folder / "lists.jsonl", bert_tokenizer)
        samples = eval_rows(task, 8)
        table = columns(predict(task, samples))
        assert table["labels"][:3] == ["cat, mat", "cat", "dog, mat"]
        for sample, found in zip(samples, table["predictions"], strict=True):
            own = logits_alone(task, sample, "input_ids", "attention_mask")
            assert found == ", ".join(kind for kind, logit in zip(kinds, own, strict=True) if logit > 0)

    def test_mixed_precision_is_that_of_the_evaluation(self, classifier: Task, heard: pytest.LogCaptureFixture) -> None:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        task = replace(classifier, model=type(classifier.model)(classifier.model.config))
        task.model.load_state_dict(classifier.model.state_dict())
        wrapped = accelerator.prepare_model(task.model)
        found = predict(replace(task, model=accelerator.unwrap_model(wrapped)), eval_rows(task, 8))
        batch = task.data_collator(eval_rows(task, 8))
        with torch.no_grad():
            evaluated = wrapped.eval()(**batch).logits.softmax(-1)
        exact = predict(classifier, eval_rows(task, 8)).probabilities
        assert torch.equal(torch.tensor(found.probabilities), evaluated)
        assert not torch.equal(torch.tensor(exact), evaluated)
        assert heard.records == []


def nothing(model: torch.nn.Module, samples: Sequence[Any]) -> SamplePredictions:
    return SamplePredictions(columns=["sample"], rows=[[str(sample)] for sample in samples])


class Rude:
    """A hook that leaves nothing as it was, except the weights."""

    def __init__(self, *, error: Exception | None = None) -> None:
        self.error = error
        self.modes: set[bool] = set()

    def __call__(self, model: Any, samples: Sequence[Any]) -> SamplePredictions:
        self.modes = {module.training for module in model.modules()} | {torch.is_grad_enabled()}
        random.random()
        np.random.rand(3)
        torch.rand(3)
        model.train()
        getattr(model, f"{CHECKPOINTING}_disable")()
        model.config.use_cache = True
        model.generation_config.temperature = 0.1
        model.generation_config = None
        if self.error is not None:
            raise self.error
        return nothing(model, samples)


def same(one: rng.RngState, other: rng.RngState) -> bool:
    return (
        one["python"] == other["python"]
        and all(np.array_equal(a, b) for a, b in zip(one["numpy"], other["numpy"], strict=True))
        and torch.equal(one["cpu"], other["cpu"])
    )


class TestUndisturbed:
    @pytest.mark.parametrize("error", [None, ValueError("no")], ids=["returns", "raises"])
    def test_generators_modes_and_settings_are_as_before(self, gpt: Task, error: Exception | None) -> None:
        model: Any = type(gpt.model)(gpt.model.config)
        getattr(model, f"{CHECKPOINTING}_enable")()
        model.config.use_cache = False
        model.train()
        model.transformer.h[0].attn.eval()  # frozen, as users have it
        modules = list(model.modules())
        modes = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in modules]
        assert {on for on, _ in modes} == {True, False}
        assert True in {on for _, on in modes}
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        settings, given = model.generation_config, dict(vars(model.generation_config))
        generators, hook = rng.capture_host(), Rude(error=error)
        values = SampleTables(hook, gpt.eval_dataset, num_samples=3, device=CPU).make(model, epoch=2.0)
        assert set(values) == (set() if error else {"sample_predictions"})
        assert hook.modes == {False}
        assert same(rng.capture_host(), generators)
        after = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in modules]
        assert after == modes
        assert model.config.use_cache is False
        assert model.generation_config is settings
        assert vars(settings) == given
        assert torch.is_grad_enabled()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("name", ["gpt", "bert", "classifier"])
    def test_shipped_tasks_move_no_training(self, name: str, request: pytest.FixtureRequest) -> None:
        task: Task = request.getfixturevalue(name)
        assert task.predict_samples is not None

        def trained(tables: SampleTables | None) -> list[torch.Tensor]:
            torch.manual_seed(3)
            model = type(task.model)(task.model.config)  # it has dropout
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                if tables is not None:
                    made = tables.make(model, epoch=1.0)
                    assert len(made["sample_predictions"].data) == 5
                # bert's collator draws its masks from the global generator
                model.train()(**task.data_collator(eval_rows(task, 4))).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return [value.detach().clone() for value in model.parameters()]

        with_tables = trained(SampleTables(task.predict_samples, task.eval_dataset, num_samples=5, device=CPU))
        assert all(map(torch.equal, with_tables, trained(None)))

    def test_stream_is_read_once_and_the_training_goes_on_in_it(self, gpt: Task) -> None:
        read: list[int] = []

        def noted(row: dict[str, Any]) -> dict[str, Any]:
            read.append(row["x"])
            return row

        stream = datasets.Dataset.from_dict({"x": list(range(20))}).to_iterable_dataset().map(noted)
        training = iter(stream)
        assert [next(training)["x"] for _ in range(3)] == [0, 1, 2]
        read.clear()
        tables = SampleTables(nothing, stream, num_samples=4, device=CPU)
        made = [tables.make(gpt.model, epoch=epoch)["sample_predictions"].data for epoch in (2.0, 4.0)]
        assert made == [[[str({"x": i}), epoch] for i in range(4)] for epoch in (2.0, 4.0)]
        assert read[:4] == [0, 1, 2, 3]
        assert len(read) <= 5
        assert [row["x"] for row in training] == list(range(3, 20))

    def test_set_smaller_than_the_table_is_shown_whole(self, gpt: Task) -> None:
        values = SampleTables(nothing, ["a", "b"], num_samples=100, device=CPU).make(gpt.model, epoch=2.0)
        assert values["sample_predictions"].data == [["a", 2.0], ["b", 2.0]]

    def test_each_of_several_sets_has_its_table(self, gpt: Task) -> None:
        values = SampleTables(nothing, {"mnli": ["a"], "mnli-mm": ["b", "c"]}, num_samples=2, device=CPU).make(
            gpt.model, epoch=2
        )
        assert {name: len(table.data) for name, table in values.items()} == {
            "sample_predictions_mnli": 1,
            "sample_predictions_mnli-mm": 2,
        }


class TestFailures:
    @pytest.mark.parametrize(
        ("hook", "reason"),
        [
            (Rude(error=RuntimeError("out of\nmemory")), "RuntimeError: out of memory"),
            (lambda *_: SamplePredictions(columns=["a", "b"], rows=[["x"]]), "each row needs 2 values: a"),
            (lambda *_: SamplePredictions(columns=["epoch"], rows=[[1]]), "the column epoch is added"),
            (lambda *_: SamplePredictions(columns=["a"], rows=[[1]], labels=[]), "labels holds 0 values"),
            (lambda *_: SamplePredictions(columns=["a"], rows=[["x"], [1]]), "TypeError"),
            (lambda *_: None, "AttributeError"),
        ],
    )
    def test_is_one_warning_that_names_hook_and_error(
        self, hook: Callable[..., Any], reason: str, gpt: Task, caplog: pytest.LogCaptureFixture
    ) -> None:
        tables = SampleTables(hook, ["a"], num_samples=2, device=CPU)
        with caplog.at_level(logging.WARNING):
            assert [tables.make(gpt.model, epoch=epoch) for epoch in (2.0, 4.0)] == [{}, {}]
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "predict_samples" in record.getMessage()
        assert reason in record.getMessage()

    def test_other_sets_keep_their_tables(self, gpt: Task, caplog: pytest.LogCaptureFixture) -> None:
        def picky(model: torch.nn.Module, samples: Sequence[Any]) -> SamplePredictions:
            if samples == ["bad"]:
                raise ValueError("no")
            return nothing(model, samples)

        tables = SampleTables(picky, {"one": ["bad"], "two": ["good"]}, num_samples=2, device=CPU)
        assert set(tables.make(gpt.model, epoch=2.0)) == {"sample_predictions_two"}
        assert len(caplog.records) == 1

    def test_interrupt_goes_through(self, gpt: Task) -> None:
        def interrupted(model: torch.nn.Module, samples: Sequence[Any]) -> SamplePredictions:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            SampleTables(interrupted, ["a"], num_samples=2, device=CPU).make(gpt.model, epoch=2.0)


def charts_of(gpt: Task, names: Sequence[str], labels: list[int], probabilities: list[list[float]]) -> dict[str, Any]:
    found = SamplePredictions(
        columns=["n"],
        rows=[[i] for i in range(len(labels))],
        class_names=names,
        labels=labels,
        probabilities=probabilities,
    )
    return SampleTables(lambda *_: found, [0], num_samples=1, device=CPU).make(gpt.model, epoch=2.0)


def one_hot(ids: Sequence[int], size: int) -> list[list[float]]:
    return np.eye(size)[list(ids)].tolist()


class TestCharts:
    def test_matrix_counts_true_against_predicted(self, gpt: Task) -> None:
        values = charts_of(gpt, ["a", "b", "c"], [0, 0, 1, 2], one_hot([0, 1, 1, 1], 3))
        counts = {(row[0], row[1]): row[2] for row in values["confusion_matrix"].table.data}
        assert len(counts) == 9
        assert {pair: n for pair, n in counts.items() if n} == {
            ("a", "a"): 1,
            ("a", "b"): 1,
            ("b", "b"): 1,
            ("c", "b"): 1,
        }

    def test_curve_of_a_class_is_of_its_own_probabilities_where_others_are_missing(self, gpt: Task) -> None:
        # Class b has no sample; c is told from a without fault, by its own column alone.
        values = charts_of(gpt, ["a", "b", "c"], [0, 2, 0, 2], [[0.6, 0.4, 0.0], [0.1, 0.4, 0.5]] * 2)
        rows = values["pr_curve"].table.data
        assert {row[0] for row in rows} == {"a", "c"}
        assert {row[1] for row in rows} == {1.0}

    def test_single_class_draws_too(self, gpt: Task) -> None:
        values = charts_of(gpt, ["a", "b"], [0, 0], one_hot([0, 1], 2))
        assert set(values) == {"sample_predictions", "confusion_matrix", "pr_curve"}

    def test_many_classes_show_those_that_occur(self, gpt: Task) -> None:
        names = [f"c{i}" for i in range(150)]
        values = charts_of(gpt, names, [3, 149], one_hot([3, 7], 150))
        rows = values["confusion_matrix"].table.data
        assert {name for row in rows for name in row[:2]} == {"c3", "c7", "c149"}
        assert [row for row in rows if row[2]] == [["c3", "c3", 1], ["c149", "c7", 1]]

    def test_matrix_too_large_for_wandb_is_left_out(self, gpt: Task) -> None:
        names = [f"c{i}" for i in range(150)]
        values = charts_of(gpt, names, list(range(150)), one_hot(range(150), 150))
        assert set(values) == {"sample_predictions", "pr_curve"}

    def test_diverged_model_has_its_table_without_charts(self, gpt: Task, caplog: pytest.LogCaptureFixture) -> None:
        values = charts_of(gpt, ["a", "b"], [0, 1], [[float("nan")] * 2] * 2)
        assert set(values) == {"sample_predictions"}
        assert caplog.records == []


OFFLINE = f"""
import sys
import torch, wandb
from pathlib import Path
from harness.tasks import TaskConfig
from harness.tasks.text import causal_lm, sequence_classification
from harness.tracking.media.tables import SampleTables

folder, cpu = Path(sys.argv[1]), torch.device("cpu")
given = dict(model_type="bert", config_overrides={TINY_BERT!r}, tokenizer_name=str(folder / "bert"))
run = wandb.init(project="tables", dir=sys.argv[2])
for step, name in enumerate(("two", "three"), 1):
    path = str(folder / (name + ".csv"))
    task = sequence_classification.build(TaskConfig(task="sequence-classification", train_file=path,
        validation_file=path, **given))
    tables = SampleTables(task.predict_samples, {{name: task.eval_dataset}}, num_samples=6, device=cpu)
    run.log({{**tables.make(task.model, epoch=2.0 * step), "train/global_step": step}})
text = str(folder / "text.txt")
task = causal_lm.build(TaskConfig(model_type="gpt2", config_overrides={TINY_GPT!r}, block_size=8, train_file=text,
    validation_file=text, tokenizer_name=str(folder / "gpt")))
tables = SampleTables(task.predict_samples, task.eval_dataset, num_samples=100, device=cpu)
for epoch in (2.0, 4.5):
    run.log({{**tables.make(task.model, epoch=epoch), "train/global_step": 3}})
run.finish()
"""


@pytest.fixture(scope="module")
def left(folder: Path, gpt: Task, classifier: Task) -> WandbFile:
    write_rows(folder / "two.csv", labelled())
    three = [{"text": text, "label": ("mat", "cat", "dog")[i % 3]} for i, text in enumerate(SENTENCES)]
    write_rows(folder / "three.csv", three)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
    places = {f"WANDB_{kind}_DIR": str(folder / f"wandb-{kind}") for kind in ("CONFIG", "CACHE", "DATA")}
    own = {"HOME": str(folder), "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true", "WANDB_MODE": "offline"}
    subprocess.run(
        [sys.executable, "-c", OFFLINE, str(folder), str(folder)],
        env={**kept, **places, **own},
        cwd=folder,
        check=True,
        timeout=120,
    )
    (found,) = read_all(folder)
    return found


def table_of(left: WandbFile, row: int, name: str) -> dict[str, Any]:
    entry = {key.removeprefix(f"{name}."): value for key, value in left.rows[row].items() if key.startswith(name)}
    # As one value of JSON, or a value each key of it.
    entry = entry.get(name, entry)
    assert entry["_type"] == "table-file"
    path = left.path.parent / "files" / entry["path"]
    assert path.parent == left.path.parent / "files/media/table"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
class TestRun:
    @pytest.mark.parametrize(("row", "name", "classes"), [(0, "two", 2), (1, "three", 3)])
    def test_classification_has_table_and_charts(self, left: WandbFile, row: int, name: str, classes: int) -> None:
        found = table_of(left, row, f"sample_predictions_{name}")
        assert found["columns"] == ["inputs", "labels", "predictions", "probability", "epoch"]
        assert [line[0] for line in found["data"]] == SENTENCES[:6]
        assert {line[4] for line in found["data"]} == {2.0 * (row + 1)}
        matrix = table_of(left, row, f"confusion_matrix_{name}_table")
        assert matrix["columns"] == ["Actual", "Predicted", "nPredictions"]
        assert len(matrix["data"]) == classes**2
        assert sum(line[2] for line in matrix["data"]) == 6
        curves = table_of(left, row, f"pr_curve_{name}_table")
        assert curves["columns"] == ["class", "precision", "recall"]
        assert len({line[0] for line in curves["data"]}) == classes

    def test_text_has_a_table_each_time_with_its_epoch(self, left: WandbFile, gpt: Task) -> None:
        for row, epoch in ((2, 2.0), (3, 4.5)):
            found = table_of(left, row, "sample_predictions")
            assert found["columns"] == ["inputs", "labels", "predictions", "epoch"]
            assert {line[3] for line in found["data"]} == {epoch}
            assert "the" in found["data"][0][0] + found["data"][0][1]


@pytest.mark.slow
def test_tables_come_with_the_evaluations_that_are_due_and_change_no_number(
    folder: Path, gpt: Task, tmp_path: Path
) -> None:
    arguments = {
        "model_type": "gpt2",
        "config_overrides": TINY_GPT,
        "block_size": 16,
        "train_file": folder / "text.txt",
        "validation_file": folder / "text.txt",
        "tokenizer_name": folder / "gpt",
        "num_train_epochs": 4,
        "eval_strategy": "steps",
        "eval_steps": 0.125,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
    }
    run_harness(tmp_path / "without", {**arguments, "task": "causal-lm"})
    flags = as_flags({**arguments, "output_dir": tmp_path / "with", "use_cpu": True, "wandb_eval_samples": 5})
    ended = run([sys.executable, SCRIPT, *flags], WANDB_MODE="offline", WANDB_SILENT="true")
    assert ended.code == 0, ended.err
    assert_equal_runs(tmp_path / "without", tmp_path / "with")
    (left,) = read_all(tmp_path / "with")
    rows = [i for i, row in enumerate(left.rows) if any(name.startswith("sample_predictions") for name in row)]
    tables = [table_of(left, row, "sample_predictions") for row in rows]
    assert [(len(table["data"]), table["data"][0][3]) for table in tables] == [(5, 2.0), (5, 4.0)]
    assert [left.rows[row - 1]["eval/loss"] > 0 for row in rows] == [True, True]
