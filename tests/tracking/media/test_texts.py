"""What a model writes while it is trained: greedy texts, when they come, and that a training does not feel them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from harness.errors import ConfigError
from harness.flags import parse
from harness.tasks import Task, TaskConfig
from harness.tasks.text import causal_lm
from harness.train import main
from tests.support.inputs import SENTENCES, save_bert_tokenizer, save_gpt_tokenizer, text_flags, write_text
from tests.support.launching import FSDP2 as FSDP
from tests.support.launching import ROOT, SCRIPT, Ended, launcher, needs_fsdp, run
from tests.support.parity import as_flags, assert_equal_runs, history, reset
from tests.support.two_processes import rows

PROMPTS = ["the old cat", "the red"]
TRAINING: dict[str, Any] = {
    "max_steps": 12,
    "logging_steps": 4,
    "learning_rate": 1e-2,
    "seed": 3,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "report_to": "none",
}
TINY_T5 = "d_model=16,d_kv=8,d_ff=32,num_layers=1,num_decoder_layers=1,num_heads=2,dropout_rate=0.0"
TINY_BART = "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,decoder_attention_heads=2"
TINY_BART += ",encoder_ffn_dim=32,decoder_ffn_dim=32,max_position_embeddings=32,decoder_start_token_id=2"
WRITES = ["--generate_steps", "5", "--generate_max_new_tokens", "6", "--generate_prompts", *PROMPTS]
LINE = re.compile(r"step (\d+)  ('.*?'|\".*?\") -> ('.*'|\".*\")$", re.MULTILINE)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    return text_flags(save_gpt_tokenizer(folder / "gpt"), write_text(folder / "text.txt"))


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("harness.tracking.media.texts")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def trains(folder: Path, flags: list[str], *more: str, **arguments: Any) -> None:
    reset()
    given = as_flags({**TRAINING, "output_dir": folder, **arguments})
    assert main([*flags, *given, "--use_cpu", *more]) == 0


def shown(out: str) -> list[tuple[int, str, str]]:
    return [(int(step), prompt, text) for step, prompt, text in LINE.findall(out)]


def greedy(folder: Path, prompt: str, count: int) -> str:
    """The likeliest tokens one by one, without a cache and without generate."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return str(tokenizer.decode(ids[0, -count:]))


def test_every_n_steps_the_likeliest_text_is_shown_for_each_prompt(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trains(tmp_path / "run", flags, *WRITES, max_steps=10, save_strategy="steps", save_steps=5)
    found = shown(capsys.readouterr().out)
    assert [(step, prompt) for step, prompt, _ in found] == [(step, repr(each)) for step in (5, 10) for each in PROMPTS]
    for step, prompt, text in found:
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        assert text == repr(greedy(checkpoint, prompt.strip("'"), 6))


def test_a_training_does_not_feel_it(flags: list[str], tmp_path: Path) -> None:
    dropping = ["--eval_strategy=steps", "--eval_steps=5", "--activation_checkpointing"]
    trains(tmp_path / "without", flags, *dropping)
    trains(tmp_path / "with", flags, *dropping, *WRITES)
    assert_equal_runs(tmp_path / "without", tmp_path / "with")


def test_in_wandb_it_is_a_table_once_over_restarts(flags: list[str], tmp_path: Path) -> None:
    arguments = {"report_to": "wandb", "wandb_mode": "offline", "save_strategy": "steps", "save_steps": 4}
    trains(tmp_path / "whole", flags, *WRITES, **arguments)
    tables = [row for row in rows(tmp_path / "whole") if "generated_texts" in row]
    assert [row["train/global_step"] for row in tables] == [5, 10]
    assert tables[0]["generated_texts"]["columns"] == ["step", "prompt", "text"]
    assert [line[:2] for line in tables[1]["generated_texts"]["data"]] == [[10, prompt] for prompt in PROMPTS]
    again = {**arguments, "resume_from_checkpoint": tmp_path / "whole" / "checkpoint-4"}
    trains(tmp_path / "whole", flags, *WRITES, **again)
    assert [row for row in rows(tmp_path / "whole") if "generated_texts" in row] == tables
    assert len(rows(tmp_path / "whole")) == len(history(tmp_path / "whole")) + 2


def test_prompts_come_from_a_file_a_line_each(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("the old cat\n\nthe red\n", encoding="utf-8")
    trains(tmp_path / "run", flags, generate_steps=12, generate_prompts_file=tmp_path / "prompts.txt")
    assert [prompt for _, prompt, _ in shown(capsys.readouterr().out)] == [repr(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(("kind", "shape"), [("t5", TINY_T5), ("bart", TINY_BART)])
def test_an_encoder_reads_the_prompt_and_the_likeliest_text_is_written(
    kind: str, shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, data = save_bert_tokenizer(tmp_path / "bert"), tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"text": each, "summary": "the cat"}) + "\n" for each in 4 * SENTENCES))
    flags = ["--task=seq2seq", f"--model_type={kind}", f"--config_overrides={shape}", f"--tokenizer_name={tokenizer}"]
    flags += [f"--train_file={data}", "--source_prefix=sat on : ", "--eval_strategy=no"]
    trains(tmp_path / "run", flags, *WRITES, max_steps=5)
    found = shown(capsys.readouterr().out)
    assert [prompt for _, prompt, _ in found] == [repr(prompt) for prompt in PROMPTS]
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    for _, prompt, text in found:
        read = saved(f"sat on : {prompt[1:-1]}", return_tensors="pt")
        given = {name: read[name] for name in ("input_ids", "attention_mask")}
        written = model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=1)[0]
        assert text == repr(saved.decode(written, skip_special_tokens=True))


def test_a_function_that_fails_is_a_warning_once(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "failing.py").write_text(
        "from dataclasses import replace\nfrom harness.tasks.text import causal_lm\n"
        "def build(config):\n    return replace(causal_lm.build(config), complete=lambda model, prompts: ['one'])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    trains(tmp_path / "run", [flag for flag in flags if "--task=" not in flag], *WRITES, task="failing:build")
    assert [record.getMessage().partition(", the training")[0] for record in told.records] == [
        "The task's complete failed, no text is shown"
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--generate_steps=5"], "--generate_steps=5 needs prompts: give --generate_prompts or"),
        (["--generate_prompts=a"], "--generate_prompts does nothing without --generate_steps"),
        (["--generate_steps=0", "--generate_prompts=a"], "--generate_steps=0"),
        (["--generate_steps=5", "--generate_prompts=a", "--generate_prompts_file=b"], "both give the prompts"),
        (["--generate_steps=5", "--generate_prompts=a", "--generate_max_new_tokens=0"], "--generate_max_new_tokens=0"),
    ],
)
def test_flags_that_do_not_fit_are_refused_at_once(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(["--model_type=gpt2", *given])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--generate_prompts= "], "--generate_prompts: a prompt is empty"),
        (["--generate_prompts_file=/no/such/file.txt"], "--generate_prompts_file=/no/such/file.txt can't be read"),
        ([f"--generate_prompts={'the cat ' * 40}"], "tokens, and the model takes up to 32 with those that it writes"),
    ],
)
def test_prompts_that_can_not_be_used_are_refused_before_the_first_step(
    given: list[str], message: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reset()
    of_run = as_flags({**TRAINING, "output_dir": tmp_path / "run", "generate_steps": 5})
    assert main([*flags, *of_run, "--use_cpu", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_task_that_writes_no_texts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {**TRAINING, "task": "tests.support.tasks.parity_task:build", "output_dir": tmp_path / "run"}
    assert main([*as_flags(given), "--use_cpu", *WRITES]) == 2
    assert "parity_task:build has no `complete` that writes a text for a prompt" in capsys.readouterr().err


def test_longer_prompts_leave_room_for_fewer_tokens(flags: list[str], tmp_path: Path) -> None:
    torch.manual_seed(1)
    prompt = "the cat " * 3
    task: Task = causal_lm.build(TaskConfig(**as_fields(flags), generate_steps=1, generate_prompts=[prompt]))
    assert task.complete is not None
    (text,) = task.complete(task.model.eval(), [prompt])
    for each in (task.model, task.processing_class):
        each.save_pretrained(tmp_path)  # type: ignore[operator]
    assert text == greedy(tmp_path, prompt, 32 - len(task.processing_class(prompt)["input_ids"]))


def as_fields(flags: list[str]) -> dict[str, Any]:
    pairs = [flag.removeprefix("--").split("=", 1) for flag in flags]
    return {name: int(value) if name == "block_size" else value for name, value in pairs}


# Sharded models: all ranks write together.


def launched(config: Path, folder: Path, flags: list[str], *more: str) -> Ended:
    given = as_flags({**TRAINING, "output_dir": folder, "expect_num_processes": 2, "per_device_train_batch_size": 2})
    ended = run([*launcher(config), SCRIPT, *flags, *given, *more])
    assert ended.code == 0, ended.err[-3000:]
    return ended


def same_as_on_one(config: Path, folder: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The likeliest texts, and those that are drawn after each evaluation: all ranks have to draw the same."""
    evaluates = ["--eval_strategy=steps", "--eval_steps=6"]
    launched(config, folder / "without", flags, *evaluates)
    ended = launched(config, folder / "with", flags, *evaluates, *WRITES, "--generate_samples=2")
    assert_equal_runs(folder / "without", folder / "with")
    capsys.readouterr()
    trains(folder / "alone", flags, *evaluates, *WRITES, "--generate_samples=2")
    assert shown(ended.out) == shown(capsys.readouterr().out)
    assert len(shown(ended.out)) == 2 * len(PROMPTS) + 2 * 2 * len(PROMPTS)


@pytest.mark.slow
@needs_fsdp
def test_fsdp_writes_what_one_process_writes(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = [f"{flag},resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0" if "overrides" in flag else flag for flag in flags]
    same_as_on_one(FSDP, tmp_path, quiet, capsys)


@pytest.mark.deepspeed
@pytest.mark.timeout(900)
@pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")
def test_zero_3_writes_together(flags: list[str], tmp_path: Path) -> None:
    zero3 = ROOT / "launch_configs" / "zero3.yaml"
    launched(zero3, tmp_path / "without", flags)
    ended = launched(zero3, tmp_path / "with", flags, *WRITES)
    assert_equal_runs(tmp_path / "without", tmp_path / "with")
    assert len(shown(ended.out)) == 2 * len(PROMPTS)
