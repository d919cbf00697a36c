"""The command from end to end: what it writes, and that it can be used and repeated."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from harness.checkpoint.find import list_checkpoints
from harness.train import main
from tests.support.inputs import (
    label_flags,
    labelled,
    save_bert_tokenizer,
    save_gpt_tokenizer,
    text_flags,
    write_rows,
    write_text,
)
from tests.support.parity import TRAINING, assert_equal_runs, assert_equal_weights, history, reset, run_harness

FAST = ["--report_to=none", "--use_cpu", "--max_steps=3", "--logging_steps=1", "--save_strategy=no"]
PARITY = ["--task=tests.support.tasks.parity_task:build", *FAST]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    return text_flags(save_gpt_tokenizer(folder / "tokenizer"), write_text(folder / "train.txt"))


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("labels")
    rows = labelled(3)
    return [
        *label_flags(save_bert_tokenizer(folder / "tokenizer"), write_rows(folder / "train.csv", rows)),
        f"--validation_file={write_rows(folder / 'validation.csv', rows[:5])}",
        f"--test_file={write_rows(folder / 'test.csv', [{'text': row['text']} for row in rows[:6]])}",
    ]


def results(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return found


def test_the_final_folder_loads_with_from_pretrained(text: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*text, *FAST, f"--output_dir={out}"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    loss = model(
        **tokenizer("the old cat", return_tensors="pt"), labels=tokenizer("the old cat", return_tensors="pt").input_ids
    ).loss
    assert loss.isfinite()
    assert model.num_parameters() < 100_000


def test_a_checkpoint_loads_with_from_pretrained(labels: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*labels, *FAST[:-1], "--save_steps=2", f"--output_dir={out}"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(out / "checkpoint-2")
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert AutoTokenizer.from_pretrained(out / "checkpoint-2").pad_token == "[PAD]"  # noqa: S105


def test_do_eval_and_do_predict_after_the_training_write_their_results(labels: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--do_train", "--do_eval", "--do_predict", f"--output_dir={out}"]
    assert main([*labels, *FAST, *flags]) == 0
    found = results(out)
    assert {"train_loss", "train_runtime", "eval_loss", "eval_accuracy", "eval_runtime"} <= found.keys()
    lines = (out / "predict_results.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(6)]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"cat", "dog"}


def test_do_eval_alone_evaluates_a_trained_folder_without_touching_it(
    labels: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, out = tmp_path / "trained", tmp_path / "out"
    assert main([*labels, *FAST, f"--output_dir={trained}", "--do_train", "--do_eval"]) == 0
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    expected = results(trained)
    reset()
    from_folder = [flag for flag in labels if not flag.startswith(("--model_type", "--config_overrides"))]
    model = f"--model_name_or_path={trained}"
    assert "Evaluating only" not in capsys.readouterr().out
    assert main([*from_folder, model, *FAST, f"--output_dir={out}", "--do_eval"]) == 0
    assert "Evaluating only: nothing is trained." in capsys.readouterr().out
    found = results(out)
    assert (found["eval_loss"], found["eval_accuracy"]) == (expected["eval_loss"], expected["eval_accuracy"])
    assert not any(name.startswith("train_") for name in found)
    assert not (out / "model.safetensors").exists()
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_the_last_evaluation_is_that_of_do_eval(labels: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--do_train", "--do_eval", "--eval_strategy=steps", "--eval_steps=3", f"--output_dir={out}"]
    assert main([*labels, *FAST, *flags]) == 0
    evaluations = [entry["eval_loss"] for entry in history(out) if "eval_loss" in entry]
    assert evaluations == [results(out)["eval_loss"]]


@pytest.mark.parametrize("kind", ["bf16_full_eval", "fp16_full_eval"])
def test_full_evaluation_in_half_precision_leaves_the_saved_model(kind: str, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    flags = ["--do_train", "--do_eval"]
    assert main([*PARITY, *flags, f"--output_dir={plain}"]) == 0
    reset()
    assert main([*PARITY, *flags, f"--{kind}", f"--output_dir={out}"]) == 0
    assert results(out)["eval_loss"] == pytest.approx(results(plain)["eval_loss"], rel=2e-2)
    assert results(out)["eval_loss"] != results(plain)["eval_loss"]
    assert_equal_weights(plain, out)


def test_two_runs_without_a_folder_get_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        reset()
        assert main(PARITY) == 0
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all((folder / "model.safetensors").is_file() for folder in folders)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"save_total_limit": 2}, [9, 12]),
        ({"save_total_limit": 1}, [12]),
        ({}, [3, 6, 9, 12]),
    ],
)
def test_so_many_checkpoints_are_kept(options: dict[str, Any], kept: list[int], tmp_path: Path) -> None:
    run_harness(tmp_path, {**TRAINING, "max_steps": 12, "save_strategy": "steps", "save_steps": 3, **options})
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]


def test_the_recorded_configuration_repeats_the_run(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = {
        **TRAINING,
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"power": 2.0},
        "weight_decay": 0.1,
    }
    run_harness(first, arguments, task_config={"task_args": {"size": 60}})
    reset()
    recorded = first / "harness_config.yaml"
    values = yaml.safe_load(recorded.read_text(encoding="utf-8"))
    assert values["learning_rate"] == 2e-3
    assert main([f"--config={recorded}", f"--output_dir={second}"]) == 0
    assert_equal_runs(first, second)
    again = yaml.safe_load((second / "harness_config.yaml").read_text(encoding="utf-8"))
    assert {**again, "output_dir": None} == {**values, "output_dir": None}


def test_the_end_says_what_came_out_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--eval_strategy=steps",
        "--eval_steps=2",
        "--metric_for_best_model=accuracy",
        f"--output_dir={tmp_path / 'out'}",
    ]
    assert main([*PARITY, *flags]) == 0
    said = capsys.readouterr().out
    table = dict(line.split("  ", 1) for line in said.splitlines()[-5:])
    assert [name.strip() for name in table] == ["train", "eval", "best eval_accuracy", "speed", "folder"]
    last = {name: value for entry in history(tmp_path / "out") for name, value in entry.items()}
    number = r"(\S+)"
    losses = re.search(rf" loss {number}  train_loss {number}  grad_norm {number}  lr {number}$", table["train"])
    evaluated = re.search(rf"eval_loss {number}  eval_accuracy {number}$", table["eval"])
    assert losses is not None
    assert evaluated is not None
    names = ("loss", "train_loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy")
    shown = [float(value) for value in (*losses.groups(), *evaluated.groups())]
    assert shown == pytest.approx([last[name] for name in names], rel=1e-2)
    assert "at step" in table["best eval_accuracy"]
    assert said.count(str(tmp_path / "out")) == 1


def test_a_resume_of_a_finished_run_trains_no_step(tmp_path: Path) -> None:
    arguments = {**TRAINING, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    run_harness(tmp_path / "run", arguments)
    before = history(tmp_path / "run")
    run_harness(tmp_path / "run", {**arguments, "resume_from_checkpoint": "true"})
    found = history(tmp_path / "run")
    assert [entry for entry in found if "loss" in entry] == [entry for entry in before if "loss" in entry]
    assert found[-1]["step"] == 6


def test_an_interrupt_ends_with_130(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task=tests.support.tasks.odd_tasks:interrupted", *FAST, f"--output_dir={tmp_path / 'out'}"]
    # A job in the background of a script ignores the signal from birth; so would this test.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(flags) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    says = "harness train: Interrupted at step 2 of 3: nothing is saved with --save_strategy no."
    assert capsys.readouterr().err.splitlines()[-1] == says


def test_out_of_memory_says_what_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task=tests.support.tasks.odd_tasks:out_of_memory", *FAST, f"--output_dir={tmp_path / 'out'}"]
    assert main(flags) == 1
    shown = capsys.readouterr().err
    assert shown.count("harness train: ") == 1
    assert "--per_device_train_batch_size" in shown
    assert "--activation_checkpointing" in shown
    assert "Traceback" not in shown
