"""From text to text: what a sample holds, scores equal to the libraries', and generation in an evaluation."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments

from harness.config import release
from harness.errors import ConfigError
from harness.tasks import Task, TaskConfig
from harness.tasks.scores.generated import TextScores
from harness.tasks.text import seq2seq
from harness.train import main
from tests.support.launching import SCRIPT, run

ROOT = Path(__file__).parents[2]
NOUNS, VERBS = ("cat", "dog", "hen", "cow"), ("sat", "ran", "slept")
WORDS = ("the", "on", "mat", "tell", ":", "a", *NOUNS, *VERBS)
TINY_T5 = "d_model=32,d_kv=8,d_ff=64,num_layers=1,num_decoder_layers=1,num_heads=4,dropout_rate=0.0"
TINY_BART = "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,decoder_attention_heads=2"
TINY_BART += ",encoder_ffn_dim=32,decoder_ffn_dim=32,max_position_embeddings=32,decoder_start_token_id=1"


def pairs(count: int) -> list[dict[str, str]]:
    """The noun and the verb are to be found and to be written where they belong."""
    chosen = [(NOUNS[i % 4], VERBS[i // 4 % 3]) for i in range(count)]
    return [{"text": f"the {noun} {verb} on the mat", "summary": f"a {noun} {verb} on a mat"} for noun, verb in chosen]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("words")
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def given(tmp_path: Path, tokenizer: str) -> dict[str, Any]:
    path = write(tmp_path / "train.jsonl", pairs(48))
    return {
        "task": "seq2seq",
        "model_type": "t5",
        "config_overrides": TINY_T5,
        "tokenizer_name": tokenizer,
        "train_file": path,
        "validation_file": path,
    }


def built(given: dict[str, Any], **changes: Any) -> Task:
    return seq2seq.build(TaskConfig(**{**given, **changes}))


def as_argv(given: dict[str, Any], **changes: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in {**given, **changes}.items()]


class TestSamples:
    def test_they_hold_both_texts(self, given: dict[str, Any]) -> None:
        task = built(given, source_prefix="tell : ")
        sample = task.train_dataset[0]
        assert task.processing_class.decode(sample["input_ids"]) == "tell : the cat sat on the mat </s>"
        assert task.processing_class.decode(sample["labels"]) == "a cat sat on a mat </s>"
        assert task.generate is None
        assert task.metrics is not None
        assert task.metrics().names == ("accuracy",)

    def test_longer_texts_are_cut_and_all_may_be_padded(self, given: dict[str, Any]) -> None:
        task = built(given, max_source_length=4, max_target_length=2)
        assert {(len(row["input_ids"]), len(row["labels"])) for row in task.train_dataset} == {(4, 2)}
        task = built(given, max_source_length=12, max_target_length=10, pad_to_max_length=True)
        assert {(len(row["input_ids"]), len(row["labels"])) for row in task.train_dataset} == {(12, 10)}
        assert task.train_dataset[0]["labels"][7:] == [-100] * 3

    def test_columns_are_found_or_named(self, given: dict[str, Any], tmp_path: Path) -> None:
        rows = [{"document": row["text"], "summary": row["summary"]} for row in pairs(4)]
        files = dict.fromkeys(("train_file", "validation_file"), write(tmp_path / "b.jsonl", rows))
        one = built(given, **files)
        rows = [{"id": "x", "title": "a", "body": row["text"], "short": row["summary"]} for row in pairs(4)]
        files = dict.fromkeys(("train_file", "validation_file"), write(tmp_path / "c.jsonl", rows))
        two = built(given, **files, text_column_names="title,body", summary_column="short")
        decode = two.processing_class.decode
        assert decode(one.train_dataset[0]["input_ids"]) == "the cat sat on the mat </s>"
        assert decode(two.train_dataset[0]["input_ids"]) == "a the cat sat on the mat </s>"
        assert decode(two.train_dataset[0]["labels"]) == "a cat sat on a mat </s>"

    def test_a_stream_gives_the_same(self, given: dict[str, Any]) -> None:
        whole, stream = (built(given, streaming=value, max_train_samples=5) for value in (False, True))
        assert [dict(row) for row in stream.train_dataset] == [dict(row) for row in whole.train_dataset]

    def test_a_second_build_prepares_nothing_anew(self, given: dict[str, Any]) -> None:
        first, second = (built(given) for _ in range(2))
        assert first.train_dataset.cache_files == second.train_dataset.cache_files

    @pytest.mark.skipif(release("transformers") < (5, 15), reason="transformers below 5.15 does not count the items")
    def test_label_smoothing_leaves_the_decoder_what_it_reads(self, given: dict[str, Any], tmp_path: Path) -> None:
        argv = as_argv(given, max_steps=2, label_smoothing_factor=0.1, report_to="none", output_dir=tmp_path / "out")
        assert main([*argv, "--do_train", "--do_eval", "--use_cpu"]) == 0
        results = json.loads((tmp_path / "out" / "all_results.json").read_text(encoding="utf-8"))
        assert math.isfinite(results["eval_loss"])

    def test_a_batch_has_what_the_decoder_reads(self, given: dict[str, Any]) -> None:
        task = built(given)
        batch = task.data_collator([task.train_dataset[0], task.train_dataset[1]])
        assert batch["decoder_input_ids"].tolist() == [[0, *row[:-1]] for row in batch["labels"].tolist()]
        unlabelled = {name: value for name, value in task.train_dataset[0].items() if name != "labels"}
        assert set(task.data_collator([unlabelled])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"summary_column": "highlights"}, ["--summary_column", "'highlights'", "text, summary"]),
        ({"text_column_names": "article"}, ["--text_column_names", "'article'", "text, summary"]),
        ({"text_column_names": "summary"}, ["--text_column_names", "'summary'", "the one to read"]),
        ({"validation_file": "two.jsonl", "train_file": "two.jsonl"}, ["two.jsonl", "a, b", "--text_column_names"]),
        ({"train_file": "empty.jsonl"}, ["empty.jsonl", "rows without a value in 'summary'"]),
        ({"test_file": "test.jsonl"}, ["test.jsonl", "no column 'summary'", "--predict_with_generate"]),
        ({"max_source_length": 33}, ["--max_source_length=33", "32 or less"]),
        ({"max_target_length": 33}, ["--max_target_length=33", "32 or less"]),
        ({"predict_with_generate": True, "generation_max_length": 33}, ["--generation_max_length=33", "32 or less"]),
        ({"generation_num_beams": 2}, ["--generation_num_beams=2", "--predict_with_generate"]),
        ({"generation_max_length": 9}, ["--generation_max_length=9", "--predict_with_generate"]),
        ({"predict_with_generate": True, "generation_num_beams": 0}, ["--generation_num_beams=0", "1 or more"]),
        ({"max_source_length": 0}, ["--max_source_length=0", "1 or more"]),
        ({"max_target_length": 0}, ["--max_target_length=0", "1 or more"]),
        ({"model_type": "gpt2", "config_overrides": None}, ["gpt2 model can't be made"]),
    ],
)
def test_bad_input_is_refused_with_what_to_do(
    changes: dict[str, Any], parts: list[str], given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("two.jsonl"), [{"a": "x", "b": "y", "summary": "z"}])
    write(Path("empty.jsonl"), [{"text": "x", "summary": "y"}, {"text": "x", "summary": None}])
    write(Path("test.jsonl"), [{"text": "x"}])
    bart = {"model_type": "bart", "config_overrides": TINY_BART}
    with pytest.raises(ConfigError) as error:
        built({**given, **bart}, **changes)
    for part in parts:
        assert part in str(error.value)


def test_a_model_without_a_token_to_begin_from_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    built(given).model.config.save_pretrained(tmp_path / "t5")
    file = tmp_path / "t5" / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    assert values.pop("decoder_start_token_id") == 0  # a new T5 begins from the padding
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"t5 has no decoder_start_token_id.*write it into config\.json"):
        built(given, model_type=None, config_overrides=None, config_name=str(tmp_path / "t5"))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("summary_column", "x"),
        ("source_prefix", "x"),
        ("max_source_length", 8),
        ("max_target_length", 8),
        ("predict_with_generate", True),
        ("generation_max_length", 8),
        ("generation_num_beams", 2),
    ],
)
def test_a_flag_is_refused_where_no_task_reads_it(flag: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"--{flag}={value} is of --task seq2seq.*leave it out"):
        TaskConfig(task="causal-lm", **{flag: value})


@pytest.mark.parametrize("missing", ["rouge_score", "sacrebleu"])
def test_a_library_that_is_not_installed_is_named(
    missing: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)  # as Python marks what can't be imported
    with pytest.raises(ConfigError, match=rf"--predict_with_generate.*{missing}.*pip install rouge-score sacrebleu"):
        built(given, predict_with_generate=True)


class TestScores:
    def test_they_equal_those_of_the_libraries(self, tokenizer: str) -> None:
        words = PreTrainedTokenizerFast.from_pretrained(tokenizer)
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(3, len(words), (30, 9), generator=generator)
        generated = torch.where(torch.rand(30, 9, generator=generator) < 0.7, labels, labels.roll(1, dims=1))
        lengths = torch.randint(4, 9, (30, 2), generator=generator)
        places = torch.arange(9)
        labels = labels.masked_fill(places > lengths[:, :1], -100)
        generated = generated.masked_fill(places > lengths[:, 1:], 0)  # the padding of a batch
        generated[::3, 8:] = -100  # and that of the ranks
        score = TextScores(words)
        for start in range(0, 30, 7):
            batch = slice(start, start + 7)
            score.update(score.predictions(generated[batch], labels[batch]), labels[batch])
        texts, expected = (
            [words.decode([token for token in row if token > 0]) for row in rows.tolist()]
            for rows in (generated, labels)
        )
        rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        each = [rouge.score(target, text) for target, text in zip(expected, texts, strict=True)]
        right = {name: 100 * np.mean([one[name].fmeasure for one in each]) for name in ("rouge1", "rouge2", "rougeL")}
        right |= {"bleu": BLEU().corpus_score(texts, [expected]).score, "gen_len": float((generated > 0).sum() / 30)}
        values = score.compute()
        assert tuple(values) == score.names
        assert values == pytest.approx(right, rel=1e-6)
        assert 10 < values["bleu"] < 90

    def test_nothing_counted_is_nan_and_nothing_right_is_zero(self, tokenizer: str) -> None:
        score = TextScores(PreTrainedTokenizerFast.from_pretrained(tokenizer))
        assert all(math.isnan(value) for value in score.compute().values())
        score.update(torch.tensor([[0, 3, 4, 5, 6, 1]]), torch.tensor([[7, 8, 9, 10, 1, -100]]))
        assert score.compute() == {"rouge1": 0, "rouge2": 0, "rougeL": 0, "bleu": 0, "gen_len": 5}


@pytest.fixture(scope="module")
def trained(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Flags, and the folder of a run that has learnt something, with every flag of the task."""
    folder = tmp_path_factory.mktemp("trained")
    given = {
        "task": "seq2seq",
        "train_file": write(folder / "train.jsonl", pairs(48)),
        "validation_file": write(folder / "v.jsonl", pairs(10)),
        "test_file": write(folder / "t.jsonl", [{"text": row["text"]} for row in pairs(12)]),
        "source_prefix": "tell : ",
        "generation_max_length": 8,
        "generation_num_beams": 2,
        "per_device_eval_batch_size": 4,
        "report_to": "none",
    }
    new = {"model_type": "t5", "config_overrides": TINY_T5, "tokenizer_name": tokenizer}
    argv = as_argv({**given, **new}, learning_rate=1e-2, max_steps=60, eval_strategy="steps", eval_steps=20)
    argv += as_argv({"save_steps": 20, "metric_for_best_model": "rougeL", "load_best_model_at_end": True})
    argv += ["--predict_with_generate", "--do_train", "--do_predict", "--use_cpu", f"--output_dir={folder / 'out'}"]
    assert main(argv) == 0
    return given, folder / "out"


class TestGeneration:
    def test_a_model_learns_to_write_the_texts(self, trained: tuple[dict[str, Any], Path]) -> None:
        history = json.loads((trained[1] / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        scores = [entry["eval_rougeL"] for entry in history if "eval_rougeL" in entry]
        assert len(scores) == 3
        assert max(scores) > scores[0]
        assert max(scores) > 90
        lines = (trained[1] / "predict_results.txt").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 12
        assert sum(line == row["summary"] for line, row in zip(lines, pairs(12), strict=True)) >= 4

    def test_an_evaluation_equals_the_trainers(self, trained: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
        """In whole batches: a last one that is not full counts as if it were in the loss of the Seq2SeqTrainer."""
        given, folder = trained
        half_trained = str(folder / "checkpoint-20")
        ours = {
            **given,
            "model_name_or_path": half_trained,
            "max_eval_samples": 8,
            "output_dir": str(tmp_path / "ours"),
        }
        assert main([*as_argv(ours), "--predict_with_generate", "--do_eval", "--use_cpu"]) == 0
        found = json.loads((tmp_path / "ours" / "all_results.json").read_text(encoding="utf-8"))
        fields = TaskConfig.__dataclass_fields__
        task = built({name: value for name, value in ours.items() if name in fields}, predict_with_generate=True)

        def scores(outcome: Any) -> dict[str, float]:
            score = TextScores(task.processing_class)
            score.update(torch.tensor(outcome.predictions), torch.tensor(outcome.label_ids))
            return score.compute()

        arguments = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / "theirs"),
            predict_with_generate=True,
            generation_max_length=8,
            generation_num_beams=2,
            per_device_eval_batch_size=4,
            report_to="none",
            use_cpu=True,
        )
        trainer = Seq2SeqTrainer(
            task.model,
            arguments,
            data_collator=task.data_collator,
            processing_class=task.processing_class,
            compute_metrics=scores,
        )
        theirs = trainer.evaluate(task.eval_dataset)
        names = ("loss", "rouge1", "rouge2", "rougeL", "bleu", "gen_len")
        assert 1 < found["eval_bleu"] < 99
        assert {name: found[f"eval_{name}"] for name in names} == {name: theirs[f"eval_{name}"] for name in names}

    def test_the_loss_alone_generates_nothing(self, trained: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
        given, folder = trained
        ours = {**given, "model_name_or_path": str(folder), "output_dir": str(tmp_path / "out")}
        argv = ["--predict_with_generate", "--do_eval", "--prediction_loss_only", "--use_cpu"]
        assert main([*as_argv(ours), *argv]) == 0
        found = json.loads((tmp_path / "out" / "all_results.json").read_text(encoding="utf-8"))
        assert "eval_loss" in found
        assert "eval_bleu" not in found

    def test_a_table_has_both_texts_and_the_models(self, trained: tuple[dict[str, Any], Path]) -> None:
        given, folder = trained
        flags = {name: value for name, value in given.items() if name in TaskConfig.__dataclass_fields__}
        task = built(flags, model_name_or_path=str(folder), predict_with_generate=True)
        task.model.eval()
        assert task.predict_samples is not None
        with torch.no_grad():
            table = task.predict_samples(task.model, [task.eval_dataset[i] for i in range(9)])
        assert table.columns == ("inputs", "labels", "predictions")
        assert table.rows[0][:2] == ["tell : the cat sat on the mat", "a cat sat on a mat"]
        assert sum(row[1] == row[2] for row in table.rows) >= 3

    @pytest.mark.slow
    def test_two_processes_score_as_one(self, trained: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
        """Ten texts in batches of four: the last are filled up, and what the ranks write differs in length."""
        given, folder = trained
        results = []
        for count in (1, 2):
            half_trained = str(folder / "checkpoint-20")
            ours = {**given, "model_name_or_path": half_trained, "output_dir": str(tmp_path / str(count))}
            launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
            launch += [str(ROOT / "launch_configs" / "ddp.yaml"), "--num_processes", str(count), str(SCRIPT)]
            argv = ["--predict_with_generate", "--do_eval", "--do_predict", "--use_cpu"]
            done = run([sys.executable, *launch, *as_argv(ours, expect_num_processes=count), *argv])
            assert done.code == 0, done.err
            lines = (tmp_path / str(count) / "predict_results.txt").read_text(encoding="utf-8").splitlines()
            results.append((json.loads((tmp_path / str(count) / "all_results.json").read_text("utf-8")), lines))
        (one, texts), (two, their_texts) = results
        assert texts == their_texts
        for name in ("rouge1", "rouge2", "rougeL", "bleu", "gen_len"):
            assert two[f"eval_{name}"] == pytest.approx(one[f"eval_{name}"], rel=1e-9)
