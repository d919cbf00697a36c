"""Texts that are drawn from the model after each evaluation: the same over restarts, and no training feels them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import ConfigError
from harness.flags import parse
from harness.tasks import Task, TaskConfig
from harness.tasks.text import causal_lm
from harness.train import main
from harness.training import rng
from tests.support.inputs import save_bert_tokenizer, save_gpt_tokenizer, text_flags, write_text
from tests.support.parity import as_flags, assert_equal_runs, reset
from tests.support.two_processes import rows

TRAINING: dict[str, Any] = {
    "max_steps": 12,
    "logging_steps": 4,
    "learning_rate": 1e-2,
    "seed": 3,
    "per_device_train_batch_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "save_strategy": "no",
    "report_to": "none",
}
DRAWS = ["--generate_samples", "3", "--generate_max_new_tokens", "6"]
LINE = re.compile(r"step (\d+)  ('.*?'|\".*?\") -> ('.*'|\".*\")$", re.MULTILINE)
OFFLINE = {"report_to": "wandb", "wandb_mode": "offline"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    return text_flags(save_gpt_tokenizer(folder / "gpt"), write_text(folder / "text.txt"))


def trains(folder: Path, flags: list[str], *more: str, **arguments: Any) -> None:
    reset()
    given = as_flags({**TRAINING, "output_dir": folder, **arguments})
    assert main([*flags, *given, "--use_cpu", *more]) == 0


def shown(capsys: pytest.CaptureFixture[str]) -> list[tuple[int, str, str]]:
    return [(int(step), prompt, text) for step, prompt, text in LINE.findall(capsys.readouterr().out)]


def test_a_training_does_not_feel_them(flags: list[str], tmp_path: Path) -> None:
    """With dropout, which draws from the same generator."""
    trains(tmp_path / "without", flags, "--activation_checkpointing")
    trains(tmp_path / "with", flags, "--activation_checkpointing", *DRAWS)
    assert_equal_runs(tmp_path / "without", tmp_path / "with")


def test_they_come_after_each_evaluation_and_a_resumed_training_draws_the_same(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = {"save_strategy": "steps", "save_steps": 8, "eval_steps": 5}
    trains(tmp_path / "whole", flags, *DRAWS, **saves)
    found = shown(capsys)
    assert [step for step, *_ in found] == [5] * 3 + [10] * 3 + [12] * 3  # the last step is evaluated
    texts = [text for *_, text in found]
    assert len(set(texts)) > 3  # they are drawn: not one likeliest text for each evaluation
    trains(tmp_path / "whole", flags, *DRAWS, **saves, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-8")
    assert shown(capsys) == found[3:]
    trains(tmp_path / "other", flags, *DRAWS, **{**saves, "seed": 4})
    assert {text for *_, text in shown(capsys)} != set(texts)


def test_prompts_are_the_users_or_the_first_tokens_of_the_evaluation_data(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = f"--validation_file={write_text(tmp_path / 'held.txt', 4)}"
    short = {"max_steps": 2, "eval_steps": 2}
    trains(tmp_path / "own", flags, *DRAWS, held, "--generate_prompts", "the old", "the red", **short)
    assert [prompt for _, prompt, _ in shown(capsys)] == [repr("the old")] * 3 + [repr("the red")] * 3
    trains(tmp_path / "held", flags, *DRAWS, held, "--generate_prompt_tokens", "2", **short, **OFFLINE)
    text = (tmp_path / "held.txt").read_text(encoding="utf-8")
    (table,) = [row["sampled_texts"] for row in rows(tmp_path / "held") if "sampled_texts" in row]
    assert table["columns"] == ["step", "prompt", "text"]
    assert [(step, bool(prompt), prompt in text) for step, prompt, _ in table["data"]] == [(2, True, True)] * 3


def test_they_hang_on_weights_seed_and_step_alone(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the weights stay, and smaller batches leave the generators of dropout and shuffling elsewhere."""
    kept = {"learning_rate": 0.0, "max_steps": 4, "eval_steps": 4}
    trains(tmp_path / "four", flags, *DRAWS, **kept)
    found = shown(capsys)
    trains(tmp_path / "two", flags, *DRAWS, **kept, per_device_train_batch_size=2)
    assert shown(capsys) == found
    assert len(found) == 3


def built(flags: list[str], **more: Any) -> Task:
    pairs = [flag.removeprefix("--").split("=", 1) for flag in flags]
    named: dict[str, Any] = {name: int(value) if name == "block_size" else value for name, value in pairs}
    torch.manual_seed(1)
    return causal_lm.build(TaskConfig(**named, **{"generate_samples": 64, "generate_max_new_tokens": 40, **more}))


def drawn(task: Task) -> list[tuple[str, str]]:
    assert task.draw is not None
    with torch.no_grad(), rng.seeded(5):
        return list(task.draw(task.model.eval()))


def test_the_colder_the_fewer_texts(flags: list[str]) -> None:
    """A new model takes all tokens for about as likely, so that hardly two texts are the same."""
    assert len(set(drawn(built(flags)))) > 56
    assert len(set(drawn(built(flags, generate_temperature=0.01)))) < 48
    assert len(set(drawn(built(flags, generate_top_p=0.001)))) == 1  # the likeliest token alone


def test_a_text_ends_where_the_model_ends_it(flags: list[str]) -> None:
    """It takes one letter and the end for equally likely, and there is room for 31 of them."""
    task: Any = built(flags)
    letter = task.processing_class("x")["input_ids"][0]
    with torch.no_grad():
        task.model.transformer.ln_f.weight.zero_()
        task.model.transformer.ln_f.bias.fill_(1.0)
        task.model.get_input_embeddings().weight.fill_(-1.0)
        task.model.get_input_embeddings().weight[[letter, task.processing_class.eos_token_id]] = 1.0
    texts = [text for _, text in drawn(task)]
    assert {*"".join(texts)} == {"x"}
    assert sum(map(len, texts)) < 64 * 4  # one on the average


def test_texts_of_the_training_data_get_an_end(flags: list[str], tmp_path: Path) -> None:
    named = {flag.removeprefix("--").split("=", 1)[0]: flag.split("=", 1)[1] for flag in flags}
    (tmp_path / "lines.csv").write_text("text\nthe cat\nthe dog<|end|>\n", encoding="utf-8")
    given: dict[str, Any] = {**named, "block_size": 2, "train_file": str(tmp_path / "lines.csv")}
    given["validation_file"] = given["train_file"]
    task = causal_lm.build(TaskConfig(**given, append_eos=True))
    ids = [token for row in task.train_dataset for token in row["input_ids"]]
    assert task.processing_class.decode(ids).startswith("the cat<|end|>the dog")
    assert ids.count(task.processing_class.eos_token_id) <= 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--generate_samples=0"], "--generate_samples=0"),
        (["--generate_temperature=0.5"], "--generate_temperature=0.5 does nothing without --generate_samples"),
        (["--generate_top_p=0.5"], "--generate_top_p=0.5 does nothing without --generate_samples"),
        (["--generate_prompt_tokens=4"], "--generate_prompt_tokens=4 does nothing without --generate_samples"),
        (["--generate_samples=1", "--generate_temperature=0"], "--generate_temperature=0"),
        (["--generate_samples=1", "--generate_top_p=1.5"], "--generate_top_p=1.5: use a share"),
        (["--generate_samples=1", "--generate_prompt_tokens=1", "--generate_prompts=a"], "both give the prompts"),
    ],
)
def test_flags_that_do_not_fit_are_refused_at_once(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(["--model_type=gpt2", *given])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--eval_strategy=no"], "--generate_samples=3 needs evaluations: give --eval_strategy epoch or steps"),
        (["--generate_prompt_tokens=32"], "--generate_prompt_tokens=32: the model takes up to 32 tokens"),
        (["--task=tests.support.tasks.parity_task:build"], "has no `draw` that draws texts; use causal-lm"),
    ],
)
def test_what_can_not_be_drawn_is_refused_before_the_first_step(
    given: list[str], message: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reset()
    names = {flag.split("=")[0] for flag in given}
    whole = [*flags, *as_flags({**TRAINING, "output_dir": tmp_path / "run"})]
    argv = [flag for flag in whole if flag.split("=")[0] not in names]
    assert main([*argv, *given, *DRAWS, "--use_cpu"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_ends_is_refused_with_what_to_give(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = save_bert_tokenizer(tmp_path / "bert")
    none = ",bos_token_id=null,eos_token_id=null"
    kept = [flag for flag in flags if "tokenizer_name" not in flag]
    argv = [f"{flag}{none}" if "config_overrides" in flag else flag for flag in kept]
    given = as_flags({**TRAINING, "output_dir": tmp_path / "run"})
    for more, message in (
        (DRAWS, "no token that begins or ends a text"),
        (["--append_eos"], "no token that ends texts"),
    ):
        reset()
        assert main([*argv, f"--tokenizer_name={tokenizer}", *given, *more, "--use_cpu"]) == 2
        assert message in capsys.readouterr().err
