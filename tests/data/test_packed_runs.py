"""Whole trainings on packed rows: the numbers of the documents apart, and a resume to the bit, on any processes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import is_deepspeed_available

from harness.train import main
from tests.support.inputs import save_gpt_tokenizer, write_rows
from tests.support.launching import DDP, FSDP2, ROOT, SCRIPT, Ended, flags, launcher, needs_fsdp, run
from tests.support.parity import TRAINING, as_flags, assert_equal_runs, history, reset, run_harness

PACKED: dict[str, Any] = {"packing": True, "max_length": 64, "packing_window": 16}
SAVING = {**TRAINING, **PACKED, "max_steps": 12, "save_strategy": "steps", "save_steps": 3}
# Steps end in mid-epoch (5 of 35 rows), and the evaluations are packed too.
ALIKE = {**SAVING, "task_args": {"dropout": 0.0}, "eval_strategy": "steps", "eval_steps": 6}
TINY = "n_embd=16,n_layer=1,n_head=2,n_positions=64,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"
DROPPING = {"packing": True, "dataloader_drop_last": True, "per_device_eval_batch_size": 16}
TINY_BLOOM = "hidden_size=16,n_layer=1,n_head=2"


@pytest.mark.parametrize("stream", [False, True], ids=["data", "stream"])
def test_an_interrupted_run_ends_with_the_bits_of_the_whole(
    stream: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {**SAVING, "task_args": {"stream": stream}, "include_num_input_tokens_seen": "non_padding"}
    run_harness(tmp_path / "whole", arguments)
    for step in (3, 9):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        run_harness(tmp_path / f"from-{step}", {**arguments, "resume_from_checkpoint": checkpoint})
        assert_equal_runs(tmp_path / "whole", tmp_path / f"from-{step}")
    assert "The stream is read again" not in capsys.readouterr().out


def test_another_window_or_length_is_refused_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_harness(tmp_path / "run", {**SAVING, "max_steps": 3})
    for change in ({"packing_window": 17}, {"max_length": 63}):
        arguments = {**SAVING, **change, "output_dir": tmp_path / "run", "resume_from_checkpoint": True}
        arguments |= {"task": "tests.support.tasks.parity_task:build", "report_to": "none", "use_cpu": True}
        reset()
        assert main([*as_flags(arguments), "--allow_changed_arguments"]) == 2
        assert re.search(r"packing rows of 64 tokens .*--allow_changed_data_order", capsys.readouterr().err)


def tiny_flags(folder: Path, **more: Any) -> list[str]:
    words = ["the", "old", "red", "cat", "dog", "sat", "on", "a", "mat", "hill"]
    texts = [" ".join(words[(i * j) % len(words)] for j in range(1, 3 + i % 9)) for i in range(40)]
    if not (folder / "tokenizer").is_dir():
        save_gpt_tokenizer(folder / "tokenizer")
        write_rows(folder / "texts.csv", [{"text": text} for text in [*texts, "", "a"]])
    arguments: dict[str, Any] = {
        "task": "causal-lm",
        "model_type": "gpt2",
        "config_overrides": TINY,
        "tokenizer_name": folder / "tokenizer",
        "train_file": folder / "texts.csv",
        "validation_file": folder / "texts.csv",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_length": 48,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 64,  # all documents in each step
        "per_device_eval_batch_size": 64,
        "num_train_epochs": 3,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "include_num_input_tokens_seen": "non_padding",
        **more,
    }
    return as_flags(arguments)


def test_packed_and_padded_documents_have_the_same_numbers(tmp_path: Path) -> None:
    for name, more in {"packed": {"packing": True}, "padded": {}}.items():
        reset()
        assert main([*tiny_flags(tmp_path, output_dir=tmp_path / name, **more)]) == 0
    rows = [history(tmp_path / name) for name in ("packed", "padded")]
    assert len(rows[0]) == len(rows[1]) == 7
    for packed, padded in zip(*rows, strict=True):
        assert packed.keys() == padded.keys()
        assert packed["num_input_tokens_seen"] == padded["num_input_tokens_seen"], "tokens of documents, no padding"
        for key in packed.keys() & {"loss", "grad_norm", "eval_loss", "eval_accuracy"}:
            assert packed[key] == pytest.approx(padded[key], rel=2e-4), key
    for kind in ("train", "eval"):
        counted = [samples_of(tmp_path / name, kind) for name in ("packed", "padded")]
        assert counted[0] == pytest.approx(counted[1], rel=0.05), "samples are documents"


def test_a_stream_of_texts_is_packed_and_evaluated_as_texts_at_once_are(tmp_path: Path) -> None:
    packed = {"packing": True, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "packing_window": 13}
    for name, more in {"data": {"train_sampling_strategy": "sequential"}, "stream": {"streaming": True}}.items():
        reset()
        assert main(tiny_flags(tmp_path, output_dir=tmp_path / name, **packed, **more)) == 0
    expected, found = history(tmp_path / "data"), history(tmp_path / "stream")
    kept = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "num_input_tokens_seen")
    assert [{name: row[name] for name in kept if name in row} for row in found] == [
        {name: row[name] for name in kept if name in row} for row in expected
    ]
    assert samples_of(tmp_path / "stream", "eval") == pytest.approx(samples_of(tmp_path / "data", "eval"), rel=0.05)
    assert samples_of(tmp_path / "stream", "train") == pytest.approx(2 * 41, rel=0.05)


def samples_of(folder: Path, kind: str) -> float:
    """The samples that the rates of a run speak of; their seconds are rounded."""
    rows = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    (row, *_) = [row for row in rows if f"{kind}_samples_per_second" in row]
    return float(row[f"{kind}_samples_per_second"] * row[f"{kind}_runtime"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"packing": True, "model_type": "bloom", "config_overrides": TINY_BLOOM}, "does not go with a bloom model"),
        ({"packing": True, "train_sampling_strategy": "group_by_length"}, "group_by_length does nothing with"),
        ({"packing": True, "use_cache": True}, "--use_cache lets packed documents see each other"),
        ({"packing": True, "overfit_batches": 2}, "--overfit_batches=2 counts samples"),
        ({"packing": True, "max_length": None}, "--packing fills rows of --max_length tokens"),
        ({**DROPPING, "per_device_train_batch_size": 1}, "its documents fill . rows, and a round takes 16"),
        ({"packing_window": 7}, "--packing_window=7 does nothing without --packing"),
        ({"block_size": 8}, "--block_size=8 joins texts to blocks, and --max_length=48 keeps them apart"),
        ({"max_length": 65}, "--max_length=65 is more than the model's maximum; use 64"),
        ({"task": "masked-lm"}, "--max_length=48 is of --task causal-lm, and --task=masked-lm does not read it"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    more: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [flag for flag in tiny_flags(tmp_path, output_dir=tmp_path / "run", **more) if not flag.endswith("=None")]
    reset()
    assert main(given) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_alone_tries_the_model_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "run"
    assert main(tiny_flags(tmp_path, output_dir=model, max_steps=1, eval_strategy="no")) == 0
    for more, code in (({}, 0), ({"use_cache": True}, 2)):
        reset()
        given = tiny_flags(
            tmp_path, output_dir=tmp_path / "eval", packing=True, eval_strategy="no", do_eval=True, **more
        )
        given = [
            f"--model_name_or_path={model}",
            *(each for each in given if not each.startswith(("--model_type", "--config_o"))),
        ]
        assert main(given) == code, capsys.readouterr().err


# Processes


def launched(folder: Path, config: Path, processes: int, arguments: dict[str, Any]) -> Ended:
    arguments = {
        **arguments,
        "per_device_train_batch_size": 8 // processes,
        "per_device_eval_batch_size": 8 // processes,
    }
    command = [*launcher(config), f"--num_processes={processes}", SCRIPT, *flags(folder, arguments)]
    return run(command)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["data", "stream"])
def test_a_run_goes_from_two_processes_to_one_and_back_with_the_same_numbers(stream: bool, tmp_path: Path) -> None:
    arguments = {**ALIKE, "task_args": {"dropout": 0.0, "stream": stream}}
    reset()
    assert main([*flags(tmp_path / "alone", arguments), "--use_cpu"]) == 0
    moved = tmp_path / "moved"
    for processes, end in ((2, 4), (1, 9), (2, None)):
        more = {"resume_from_checkpoint": "auto", **({} if end is None else {"stop_at_step": end})}
        ended = launched(moved, DDP, processes, {**arguments, **more, "expect_num_processes": processes})
        assert ended.code == 0, ended.err[-3000:]
    expected, found = history(tmp_path / "alone"), history(moved)
    assert [list(row) for row in found] == [list(row) for row in expected]
    for a, b in zip(expected, found, strict=True):
        assert {name: pytest.approx(value, rel=1e-4) for name, value in a.items()} == b


@pytest.mark.slow
@needs_fsdp
def test_sharded_weights_are_tried_and_have_the_same_numbers(tmp_path: Path) -> None:
    arguments = {**ALIKE, "max_steps": 6, "eval_steps": 3}
    reset()
    assert main([*flags(tmp_path / "alone", arguments), "--use_cpu"]) == 0
    ended = launched(tmp_path / "sharded", FSDP2, 2, arguments)
    assert ended.code == 0, ended.err[-3000:]
    for a, b in zip(history(tmp_path / "alone"), history(tmp_path / "sharded"), strict=True):
        assert {name: pytest.approx(value, rel=1e-3) for name, value in a.items()} == b
    bloom = tiny_flags(tmp_path, output_dir=tmp_path / "run", packing=True, config_overrides=TINY_BLOOM, use_cpu=False)
    bloom = [each for each in bloom if not each.startswith(("--model_type", "--use_cpu"))]
    refused = run([*launcher(FSDP2), "--num_processes=2", SCRIPT, "--model_type=bloom", *bloom])
    assert refused.code != 0
    assert refused.err.count("does not go with a bloom model") == 1, refused.err[-3000:]


@pytest.mark.deepspeed
@pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_under_zero_is_tried_and_has_the_same_numbers(stage: int, tmp_path: Path) -> None:
    arguments = {**SAVING, "max_steps": 4, "save_strategy": "no", "task_args": {"dropout": 0.0}}
    reset()
    assert main([*flags(tmp_path / "alone", arguments), "--use_cpu"]) == 0
    ended = launched(tmp_path / "zero", ROOT / "launch_configs" / f"zero{stage}.yaml", 2, arguments)
    assert ended.code == 0, ended.err[-3000:]
    for a, b in zip(history(tmp_path / "alone"), history(tmp_path / "zero"), strict=True):
        assert {name: pytest.approx(value, rel=1e-3) for name, value in a.items() if name != "total_flos"} == {
            name: value for name, value in b.items() if name != "total_flos"
        }
