"""Masked language modelling: predict hidden tokens, as Transformers' run_mlm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

from harness.errors import ConfigError
from harness.tasks import Task
from harness.tasks.flags import TaskConfig
from harness.tasks.predictions import restored
from harness.tasks.pretrained import load_config, load_model, load_tokenizer, require_padding, sequence_length
from harness.tasks.rows import load_splits
from harness.tasks.scores.classification import TokenAccuracy
from harness.tasks.splits import Split, grouped, texts_of


def build(config: TaskConfig) -> Task:
    """
    Read text as lines or as pieces of --max_seq_length tokens and load or make the model.

    The collator masks anew in each epoch; labels are -100 at tokens that are not to be predicted. Raises ConfigError
    for input that the user can correct.
    """
    tokenizer = load_tokenizer(config)
    if tokenizer.mask_token is None:
        raise ConfigError(
            f"The tokenizer {tokenizer.name_or_path} has no mask token, which masked-lm needs; give one "
            "of a masked model (BERT, RoBERTa ...) by --tokenizer_name, or use --task causal-lm."
        )
    require_padding(tokenizer)
    model_config = load_config(config, tokenizer)
    size = sequence_length(config, tokenizer, model_config, default=1024)
    splits = load_splits(config).hold_out(config)
    columns = splits.text_columns(config)
    samples = splits.map(lambda split: _samples(split, config, columns, tokenizer, size)).cut(config)
    model = load_model(config, AutoModelForMaskedLM, model_config, tokenizer)
    shown = samples.rows("validation" if "validation" in samples else "train")
    return Task(
        model=model,
        train_dataset=samples.rows("train"),
        eval_dataset=samples.rows("validation"),
        test_dataset=samples.rows("test"),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=config.mlm_probability),
        processing_class=tokenizer,
        metrics=lambda: TokenAccuracy(shift=0),
        sample=lambda model: _restored(model, tokenizer, next(iter(shown))["input_ids"]),
        predict_samples=partial(restored, tokenizer=tokenizer, mlm_probability=config.mlm_probability),
    )


def _samples(split: Split, config: TaskConfig, columns: Sequence[str], tokenizer: Any, size: int) -> Split:
    padding = "max_length" if config.pad_to_max_length else False
    delimiter = config.text_column_delimiter

    def lines(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        texts = [text for text in texts_of(batch, columns, delimiter) if text.strip()]
        if not texts:
            return {name: [] for name in (*tokenizer.model_input_names, "special_tokens_mask")}
        return dict(
            tokenizer(texts, padding=padding, truncation=True, max_length=size, return_special_tokens_mask=True)
        )

    def tokenised(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        texts = texts_of(batch, columns, delimiter)
        return dict(tokenizer(texts, return_special_tokens_mask=True, verbose=False))

    def cut_to_size(batch: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Any]:
        return dict(grouped(batch, size))

    if config.line_by_line:
        samples = split.transform(lines, config)
        reason = "no line with text; give text, or leave --line_by_line out."
    else:
        samples = split.transform(tokenised, config).transform(cut_to_size, config, keep_columns=True)
        reason = f"fewer tokens than one sequence of {size}; lower --max_seq_length or give --line_by_line."
    samples.require_samples(reason)
    return samples


def _restored(model: torch.nn.Module, tokenizer: Any, ids: Sequence[int]) -> str:
    """Hide every eighth token of a sample's start and return what the model predicts; draws no random numbers."""
    special = set(tokenizer.all_special_ids)
    device = next(model.parameters()).device
    original = torch.tensor([list(ids)[:48]], device=device)
    hidden = [at for at, token in enumerate(original[0].tolist()) if token not in special and at % 8 == 4]
    masked = original.clone()
    masked[0, hidden] = tokenizer.mask_token_id
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=masked, attention_mask=torch.ones_like(masked)).logits
    finally:
        model.train(was_training)
    restored = masked.clone()
    restored[0, hidden] = logits[0, hidden].argmax(dim=-1)
    return f"{tokenizer.decode(masked[0])} -> {tokenizer.decode(restored[0], skip_special_tokens=True)}"
