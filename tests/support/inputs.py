"""Small real inputs: tokenizers, text, labelled rows, and the flags of a tiny model on them."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SENTENCES = [f"the {a} {b} sat on the {c}" for a in ("old", "red") for b in ("cat", "dog") for c in ("mat", "hill")]
TINY_GPT = "n_embd=16,n_layer=1,n_head=2,n_positions=32"
TINY_BERT = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,max_position_embeddings=64"


def save_gpt_tokenizer(folder: Path) -> Path:
    """One without a padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    ends = dict.fromkeys(("bos_token", "eos_token"), "<|end|>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)
    return folder


def save_bert_tokenizer(folder: Path) -> Path:
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token=special["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name}_token": token for name, token in special.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def write_text(path: Path, lines: int = 40) -> Path:
    path.write_text("\n".join(itertools.islice(itertools.cycle(SENTENCES), lines)) + "\n", encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def labelled(copies: int = 1) -> list[dict[str, str]]:
    return [{"text": text, "label": "cat" if "cat" in text else "dog"} for text in SENTENCES * copies]


def text_flags(tokenizer: Path, train_file: Path) -> list[str]:
    """A tiny GPT-2 on a text."""
    return [
        "--task=causal-lm",
        "--model_type=gpt2",
        f"--config_overrides={TINY_GPT}",
        f"--tokenizer_name={tokenizer}",
        f"--train_file={train_file}",
        "--block_size=8",
    ]


def label_flags(tokenizer: Path, train_file: Path) -> list[str]:
    """A tiny BERT on labelled rows."""
    return [
        "--task=sequence-classification",
        "--model_type=bert",
        f"--config_overrides={TINY_BERT}",
        f"--tokenizer_name={tokenizer}",
        f"--train_file={train_file}",
    ]


def save_gpt(folder: Path, **config: object) -> Path:
    """A tiny GPT-2 with its tokenizer, as from_pretrained has them from the Hub."""
    save_gpt_tokenizer(folder)
    shape = {"vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    shape |= {"bos_token_id": 0, "eos_token_id": 0, **config}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)
    return folder
