"""Adapters of peft: the Trainer's numbers and files, exact resume, merged models, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from harness.__main__ import main as harness
from harness.errors import ConfigError
from harness.flags import parse
from harness.model.adapters import add_adapter, merged_model
from harness.model.flags import AdapterConfig
from harness.tasks import TaskConfig, resolve
from harness.train import main
from tests.support.inputs import TINY_BERT, labelled, save_bert_tokenizer, save_gpt, write_rows, write_text
from tests.support.parity import (
    EVERY_4,
    EVERY_EPOCH,
    TRAINING,
    as_flags,
    assert_equal_runs,
    assert_equal_weights,
    history,
    reset,
    run_harness,
    run_trainer,
)

# Asked for by the Trainer for a model without a folder; newer versions of peft don't ask.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - :UserWarning")

ADAPTED = "tests.support.tasks.parity_task:build_adapted"
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["c_attn", "c_fc"]}
LORA_FLAGS = {"lora_r": 4, "lora_alpha": 16, "lora_dropout": 0.1}
LORA_TARGETS = ("--lora_target_modules", "c_attn", "c_fc")
RESUMABLE = {"save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2, "num_train_epochs": 2}


def trained(folder: Path, arguments: Mapping[str, Any], peft: Mapping[str, Any] = LORA, **options: Any) -> None:
    """The reference: the Trainer on a PeftModel."""
    run_trainer(folder, {**TRAINING, **arguments}, task=ADAPTED, task_config={"task_args": {"peft": peft}}, **options)


def ours(folder: Path, arguments: Mapping[str, Any], **flags: Any) -> None:
    given = flags or {**LORA_FLAGS}
    run_harness(folder, {**TRAINING, **arguments, **given}, extra=() if flags else LORA_TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 2, "weight_decay": 0.1},
        {**EVERY_EPOCH, "load_best_model_at_end": True, "learning_rate": 5e-2, "metric_for_best_model": "accuracy"},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "bf16": True},
    ],
    ids=["accumulation, decay", "best at the end", "reentrant checkpointing", "smoothing, NEFTune, bf16"],
)
def test_history_and_weights_are_the_trainers(arguments: dict[str, Any], tmp_path: Path) -> None:
    trained(tmp_path / "trainer", arguments)
    ours(tmp_path / "ours", arguments)
    assert_equal_runs(tmp_path / "trainer", tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()


def test_checkpoints_hold_the_trainers_files_and_the_same_state(tmp_path: Path) -> None:
    arguments = {**EVERY_EPOCH, "load_best_model_at_end": True}
    trained(tmp_path / "trainer", arguments)
    ours(tmp_path / "ours", arguments)
    for name in ("checkpoint-15", "checkpoint-30"):
        theirs, found = tmp_path / "trainer" / name, tmp_path / "ours" / name
        names = {path.name for path in found.iterdir()}
        assert {path.name for path in theirs.iterdir()} - names == {"training_args.bin"}
        of_ours = {"harness_state.json", "metrics.jsonl", "model_config.json"}
        assert names - {path.name for path in theirs.iterdir()} == of_ours
        assert "model.safetensors" not in names, "the base is in no checkpoint"
        a, b = (json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) for folder in (theirs, found))
        for config in (a, b):
            config["target_modules"].sort()  # a set
        assert a == b
        assert_equal_weights(theirs, found)
        assert (theirs / "README.md").read_text(encoding="utf-8") == (found / "README.md").read_text(encoding="utf-8")
        a, b = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (theirs, found))
        assert len(a["state"]) == len(b["state"]) == 8, "two matrices for each of two modules in two layers"


def test_a_resume_is_the_uninterrupted_trainer_and_checkpoints_cross(tmp_path: Path) -> None:
    trained(tmp_path / "trainer", RESUMABLE)
    ours(tmp_path / "ours", RESUMABLE)
    for name, checkpoint in (("resumed", tmp_path / "ours"), ("crossed", tmp_path / "trainer")):
        ours(tmp_path / name, {**RESUMABLE, "resume_from_checkpoint": checkpoint / "checkpoint-5"})
    assert_equal_runs(tmp_path / "trainer", tmp_path / "resumed")
    trained(tmp_path / "back", RESUMABLE, resume=str(tmp_path / "ours" / "checkpoint-5"))
    for folder in ("crossed", "back"):
        assert_equal_weights(tmp_path / "trainer", tmp_path / folder)
        assert history(tmp_path / folder)[:-1] == history(tmp_path / "trainer")[:-1]


@pytest.mark.slow
# What peft and Transformers say to each other.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "LORA", "use_dora": True, "modules_to_save": ["ln_f"], "target_modules": "all-linear"},
        {"peft_type": "IA3"},
        {"peft_type": "VERA", "r": 8, "target_modules": ["c_attn"]},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
    ],
    ids=lambda config: config["peft_type"],
)
def test_any_adapter_of_peft_trains_and_resumes_as_the_trainers(config: dict[str, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    if config["peft_type"] != "PROMPT_TUNING":  # the Trainer's scores stumble over its tokens
        arguments |= {**EVERY_4, "eval_steps": 3}
    else:
        arguments["prediction_loss_only"] = True
    trained(tmp_path / "trainer", arguments, config)
    file = tmp_path / "peft.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    ours(tmp_path / "ours", arguments, peft_config=file)
    assert_equal_runs(tmp_path / "trainer", tmp_path / "ours")
    resume = {"resume_from_checkpoint": tmp_path / "ours" / "checkpoint-3"}
    ours(tmp_path / "resumed", {**arguments, **resume}, peft_config=json.dumps(config))
    assert_equal_runs(tmp_path / "trainer", tmp_path / "resumed")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by peft
def test_an_adapters_folder_is_a_model_and_merges_into_one(tmp_path: Path) -> None:
    base, text = save_gpt(tmp_path / "base"), write_text(tmp_path / "text.txt")
    common = [f"--train_file={text}", "--block_size=8", "--report_to=none", "--use_cpu"]
    run = tmp_path / "run"
    flags = ["--max_steps=4", "--learning_rate=0.5", "--use_peft", "--save_merged_model", "--eval_strategy=epoch"]
    assert main([*common, *flags, f"--model_name_or_path={base}", f"--output_dir={run}", "--save_steps=2"]) == 0
    tokens = torch.arange(16).view(2, 8)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(tokens).logits
        adapted = AutoPeftModelForCausalLM.from_pretrained(run).eval()(tokens).logits
        assert (plain - adapted).abs().max() > 0.05, "it has learnt nothing, so nothing is compared"
        whole = AutoModelForCausalLM.from_pretrained(run / "merged")
        assert harness(["export", str(run / "checkpoint-4"), str(tmp_path / "exported"), "--max_shard_size=1KB"]) == 0
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
        for model in (whole, exported, merged_model(run), AutoModelForCausalLM.from_pretrained(run)):
            torch.testing.assert_close(model.eval()(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name in load_file(run / "merged" / "model.safetensors"))
    # From its folder it is evaluated to the same loss, and trained on.
    losses = [entry["eval_loss"] for entry in history(run) if "eval_loss" in entry]
    again, on = tmp_path / "again", tmp_path / "on"
    assert main([*common, f"--model_name_or_path={run}", f"--output_dir={again}", "--do_eval"]) == 0
    found = json.loads((again / "all_results.json").read_text(encoding="utf-8"))
    assert found["eval_loss"] == losses[-1]
    assert main([*common, f"--model_name_or_path={run}", f"--output_dir={on}", "--max_steps=2"]) == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (run, on))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_classifiers_adapter_keeps_its_head_and_its_labels(tmp_path: Path) -> None:
    tokenizer, rows = save_bert_tokenizer(tmp_path / "tokenizer"), labelled()
    data = write_rows(tmp_path / "rows.csv", [*rows, {"text": "the bird sat", "label": "bird"}])
    base = tmp_path / "base"
    common = ["--task=sequence-classification", f"--train_file={data}", f"--validation_file={data}", "--use_cpu"]
    common += ["--report_to=none", "--text_column_names=text"]
    assert main([*common, "--model_type=bert", f"--tokenizer_name={tokenizer}", f"--config_overrides={TINY_BERT}",
                 "--max_steps=1", f"--output_dir={base}"]) == 0  # fmt: skip
    encoder = AutoModelForSequenceClassification.from_pretrained(base)
    encoder.config.update({"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}})
    AutoModelForSequenceClassification.from_config(encoder.config).save_pretrained(base)  # of two other labels
    run, predicted = tmp_path / "run", tmp_path / "predicted"
    lora = ["--lora_r=4", "--learning_rate=0.05", "--num_train_epochs=20", "--ignore_mismatched_sizes"]
    assert main([*common, *lora, f"--model_name_or_path={base}", f"--output_dir={run}", "--do_eval", "--do_train"]) == 0
    names = load_file(run / "adapter_model.safetensors")
    assert {name for name in names if "classifier" in name} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    flags = ["--do_predict", "--do_eval", f"--test_file={data}", f"--model_name_or_path={run}"]
    assert main([*common, *flags, f"--output_dir={predicted}"]) == 0
    a, b = (json.loads((folder / "all_results.json").read_text(encoding="utf-8")) for folder in (run, predicted))
    assert a["eval_loss"] == b["eval_loss"]
    assert "cat" in (predicted / "predict_results.txt").read_text(encoding="utf-8")
    assert merged_model(run).config.id2label == {0: "bird", 1: "cat", 2: "dog"}


TINY_T5 = "d_model=32,d_kv=8,d_ff=64,num_layers=1,num_decoder_layers=1,num_heads=4"
TAGGED = {"tokens": [["the", "cat"], ["a", "dog"]] * 4, "ner_tags": [["O", "B-PET"], ["O", "O"]] * 4}
SUMMED = {"text": ["the cat sat", "the dog sat"] * 4, "summary": ["a cat", "a dog"] * 4}
LABELLED = {"text": ["the cat sat", "the dog sat"] * 4, "label": ["cat", "dog"] * 4}


@pytest.mark.parametrize(
    ("task", "model_type", "shape", "rows", "task_type"),
    [
        ("causal-lm", "gpt2", "n_embd=16,n_layer=1,n_head=2", {"text": ["the cat sat on the mat"] * 8}, "CAUSAL_LM"),
        ("masked-lm", "bert", TINY_BERT, {"text": ["the cat sat on the mat"] * 8}, None),
        ("sequence-classification", "bert", TINY_BERT, LABELLED, "SEQ_CLS"),
        ("token-classification", "bert", TINY_BERT, TAGGED, "TOKEN_CLS"),
        ("seq2seq", "t5", TINY_T5, SUMMED, "SEQ_2_SEQ_LM"),
    ],
)
def test_each_task_takes_an_adapter_and_shows_what_it_predicts(
    task: str, model_type: str, shape: str, rows: dict[str, list[Any]], task_type: str | None, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    lines = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    files = {
        "train_file": str(data),
        "validation_file": str(data),
        "tokenizer_name": str(save_bert_tokenizer(tmp_path)),
    }
    block = {"causal-lm": {"block_size": 8}, "masked-lm": {"line_by_line": True}}.get(task, {})
    built = resolve(task)(TaskConfig(task=task, model_type=model_type, config_overrides=shape, **files, **block))
    model: Any = add_adapter(built.model, AdapterConfig(use_peft=True)).eval()
    assert model.peft_config["default"].task_type == task_type
    samples = [built.eval_dataset[index] for index in range(4)]
    with torch.no_grad():
        assert torch.isfinite(model(**built.data_collator(samples))["loss"])
        if built.predict_samples is not None:
            plain = built.predict_samples(model.get_base_model(), samples)  # a new adapter changes nothing
            assert built.predict_samples(model, samples) == plain
            assert len(plain.rows) >= 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_r=0"], "--lora_r=0: use 1 or more"),
        (["--lora_dropout=1"], "--lora_dropout=1.0: use 0 to below 1"),
        (["--peft_config={}"], "--peft_config has no peft_type"),
        (["--peft_config=missing.json"], "missing.json can't be read"),
        (["--peft_config={"], "not JSON"),
        (["--use_peft", "--model_type=gpt2"], "An adapter is saved without its model"),
        (['--peft_config={"peft_type": "LORA"}', "--lora_r=4"], "--peft_config and --lora_r both describe the adapter"),
    ],
)
def test_flags_that_describe_no_adapter_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(flags)


def test_use_peft_false_turns_off_what_a_recipe_has(tmp_path: Path) -> None:
    recipe = tmp_path / "lora.yaml"
    recipe.write_text("model_name_or_path: base\nlora_r: 4\npeft_config: null\n", encoding="utf-8")
    assert parse(["--config", str(recipe)]).adapters.is_on
    assert not parse(["--config", str(recipe), "--use_peft", "false"]).adapters.is_on


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_target_modules": "q_proj"}, "The adapter does not fit the model.*q_proj.*not found"),
        ({"peft_config": '{"peft_type": "NONE"}'}, "peft_type NONE is not known; use one of: .*LORA"),
        ({"peft_config": '{"peft_type": "LORA", "rank": 3}'}, "rank"),
        ({"peft_config": '{"peft_type": "ADALORA", "total_step": 9}'}, "ADALORA has to be told of each step"),
        ({"peft_config": '{"peft_type": "P_TUNING", "num_virtual_tokens": 4}'}, "no checkpoint could be resumed"),
        (
            {"peft_config": '{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}'},
            "PROMPT_TUNING puts tokens before the text",
        ),
        ({"save_merged_model": True}, "--save_merged_model merges an adapter, and there is none"),
        ({"use_peft": True, "task": ADAPTED, "task_args": {"peft": LORA}}, "has an adapter already"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    flags: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "task": "tests.support.tasks.parity_task:build",
        "output_dir": tmp_path / "run",
        "report_to": "none",
        **flags,
    }
    assert main([*as_flags(given), "--use_cpu"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    run_harness(tmp_path / "whole", {**TRAINING, **arguments})
    ours(tmp_path / "adapted", arguments)
    common = {"task": "tests.support.tasks.parity_task:build", "report_to": "none", "output_dir": tmp_path / "on"}
    common |= {"allow_changed_arguments": True, "max_steps": 4}
    for kind, flags, message in (
        ("whole", LORA_FLAGS, "holds a whole model, and an adapter is trained"),
        ("adapted", {}, "holds an adapter alone, and the whole model is trained"),
        ("adapted", {"lora_r": 8}, "another shape"),
    ):
        reset()
        given = {**common, **flags, "resume_from_checkpoint": tmp_path / kind / "checkpoint-2"}
        assert main([*as_flags(given), "--use_cpu"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": ["x"]}, "does not name the model"),
        ({"base_model_name_or_path": None}, "does not name the model"),
        ({"auto_mapping": "GPT2LMHeadModel"}, "of the class None"),
        ({"auto_mapping": {"base_model_class": "Trainer"}}, "of the class Trainer, which Transformers does not have"),
        ({"auto_mapping": {"base_model_class": "__path__"}}, "of the class __path__"),
        ({"task_type": ["CAUSAL_LM"]}, "of the class None"),
    ],
)
def test_a_crafted_adapter_is_refused_before_its_model_is_looked_for(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = {"base_model_name_or_path": "base", "task_type": None, **changes}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        merged_model(tmp_path)
