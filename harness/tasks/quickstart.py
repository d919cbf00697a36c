"""The run without any input: a small GPT on texts that come with every Python. Also an example of a task."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from harness.tasks import Task
from harness.tasks.flags import TaskConfig
from harness.tasks.text import causal_lm

FORMAT = 1  # version of the files made here; another number makes new ones
END = "<|endoftext|>"
VOCABULARY = 512  # small, as the text is: larger ones leave too few examples of each token
HELD_OUT_EVERY, HELD_OUT_FROM = 10, 6  # about a tenth of the text, with few repeated paragraphs


def build(config: TaskConfig) -> Task:
    """
    Make text files and a tokenizer, then call causal_lm; the model is what the flags say.

    The files are kept beside the caches of `datasets`, so later runs and other ranks find them.
    """
    folder = _prepared(Path(datasets.config.HF_DATASETS_CACHE) / "harness")
    prepared = dataclasses.replace(
        config,
        train_file=[str(folder / "train.jsonl")],
        validation_file=[str(folder / "validation.jsonl")],
        tokenizer_name=config.tokenizer_name or config.model_name_or_path or str(folder / "tokenizer"),
    )
    return causal_lm.build(prepared)


def split_topics(texts: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """
    Split the texts by topic into training and held-out ones.

    Topics quote each other at length: paragraphs of held-out texts are removed from the training texts, since otherwise
    the evaluation would reward memorizing them.
    """
    held_names = set(sorted(texts)[HELD_OUT_FROM::HELD_OUT_EVERY])
    held = [texts[name] for name in sorted(held_names)]
    seen = {" ".join(paragraph.split()) for text in held for paragraph in text.split("\n\n")}
    train = [
        "\n\n".join(part for part in texts[name].split("\n\n") if " ".join(part.split()) not in seen)
        for name in sorted(texts)
        if name not in held_names
    ]
    return [text for text in train if text.strip()], held


def _prepared(cache: Path) -> Path:
    key = json.dumps(
        [FORMAT, tokenizers.__version__, VOCABULARY, HELD_OUT_EVERY, HELD_OUT_FROM, sorted(topics.items())]
    )
    folder = cache / f"quickstart-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # The folder gets its name when it is whole, so a killed process leaves no partial one.
    partial = cache / f"{folder.name}.{secrets.token_hex(4)}"  # not of tempfile, whose folders no other user can read
    partial.mkdir()
    try:
        _write(partial)
        os.rename(partial, folder)  # noqa: PTH104 - Path.rename differs between systems where the target exists
    except OSError:
        if not folder.is_dir():
            raise
        # Another process was faster; its files are equal.
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(folder: Path) -> None:
    train, held = split_topics(topics)
    for name, texts in (("train", train), ("validation", held)):
        lines = [json.dumps({"text": text + END}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END)
    wrapped.save_pretrained(folder / "tokenizer")
