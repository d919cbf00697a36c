"""Predictions that a person can read: texts and labels beside the model's predictions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.trainer_utils import unwrap_peft_model

from harness.tasks import Generate, SamplePredictions
from harness.tasks.labels import MULTI, REGRESSION, Labels

# The column names "labels" and "predictions" are those of the W&B guide.
COLUMNS = ("inputs", "labels", "predictions")
BATCH_SIZE = 8
# Texts in a table are to be read, so of longer ones only the start is shown.
PROMPT_TOKENS, NEW_TOKENS = 64, 32
RESTORED_TOKENS = 128


def continued(model: torch.nn.Module, samples: Sequence[Mapping[str, Any]], *, tokenizer: Any) -> SamplePredictions:
    """
    Let the model continue the first half of each text, always with the likeliest token.

    Prompts are padded on the left and masked there, so each text gets the continuation that it would get alone.
    """
    texts = [list(sample["input_ids"]) for sample in samples]
    rows: list[list[str]] = []
    for batch in _batches(texts):
        prompts = [ids[: max(1, min(PROMPT_TOKENS, len(ids) // 2))] for ids in batch]
        rests = [ids[len(prompt) : len(prompt) + NEW_TOKENS] for ids, prompt in zip(batch, prompts, strict=True)]
        found = continuations(model, prompts, max(len(rest) for rest in rests), tokenizer)
        for prompt, rest, new in zip(prompts, rests, found, strict=True):
            shown = (prompt, rest, new[: len(rest)])
            rows.append([tokenizer.decode(ids, skip_special_tokens=True) for ids in shown])
    return SamplePredictions(columns=COLUMNS, rows=rows)


def restored(
    model: torch.nn.Module, samples: Sequence[Mapping[str, Any]], *, tokenizer: Any, mlm_probability: float
) -> SamplePredictions:
    """
    Hide tokens of each text and let the model predict them.

    The same tokens of a sample are hidden every time, by a generator of its own with a fixed seed.
    """
    rows: list[list[str]] = []
    for batch in _batches(samples):
        originals = [torch.tensor(list(sample["input_ids"])[:RESTORED_TOKENS]) for sample in batch]
        special = [_special(sample, tokenizer)[:RESTORED_TOKENS] for sample in batch]
        hidden = [_hidden(mask, mlm_probability) for mask in special]
        masked = [ids.masked_fill(gaps, tokenizer.mask_token_id) for ids, gaps in zip(originals, hidden, strict=True)]
        inputs = _padded(masked, tokenizer.pad_token_id, "right", model)
        guesses = model(**inputs).logits.argmax(dim=-1).cpu()
        for i, (original, mask, gaps) in enumerate(zip(originals, special, hidden, strict=True)):
            filled = torch.where(gaps, guesses[i, : len(original)], original)
            rows.append([tokenizer.decode(ids[~mask]) for ids in (masked[i], original, filled)])
    return SamplePredictions(columns=COLUMNS, rows=rows)


def classified(
    model: torch.nn.Module,
    samples: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    labels: Labels,
) -> SamplePredictions:
    """Return the predicted class of each text and its probability; also for several classes a text, or a number."""
    parts = []
    for batch in _batches(samples):
        inputs = collate([{n: value for n, value in row.items() if n != "labels"} for row in _accepted(model, batch)])
        parts.append(model(**{name: value.to(_device(model)) for name, value in inputs.items()}).logits.float().cpu())
    logits = torch.cat(parts)
    texts = [tokenizer.decode(sample["input_ids"], skip_special_tokens=True) for sample in samples]
    given = [sample["label"] for sample in samples]
    if labels.kind == REGRESSION:
        numbers = logits.reshape(len(samples)).tolist()
        return SamplePredictions(columns=COLUMNS, rows=list(zip(texts, map(float, given), numbers, strict=True)))
    if labels.kind == MULTI:
        chosen = (logits > 0).tolist()
        names = [[_names(labels, row) for row in rows] for rows in (given, chosen)]
        return SamplePredictions(columns=COLUMNS, rows=list(zip(texts, *names, strict=True)))
    return _classes(texts, given, logits, labels)


def recognised(
    model: torch.nn.Module,
    samples: Sequence[Mapping[str, Any]],
    *,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    labels: Labels,
) -> SamplePredictions:
    """Return the predicted class of each image, which is named by its number, and its probability."""
    parts, given = [], []
    for batch in _batches(samples):
        inputs = collate(list(batch))
        given += inputs["labels"].tolist()
        parts.append(model(pixel_values=inputs["pixel_values"].to(_device(model))).logits.float().cpu())
    return _classes([f"image {index}" for index in range(len(given))], given, torch.cat(parts), labels)


def _classes(inputs: Sequence[str], given: Sequence[int], logits: torch.Tensor, labels: Labels) -> SamplePredictions:
    probabilities = logits.softmax(dim=-1)
    highest, ids = (values.tolist() for values in probabilities.max(dim=-1))
    true, predicted = ([labels.names[index] for index in indices] for indices in (given, ids))
    return SamplePredictions(
        columns=(*COLUMNS, "probability"),
        rows=list(zip(inputs, true, predicted, highest, strict=True)),
        class_names=labels.names,
        labels=given,
        probabilities=probabilities.tolist(),
    )


def tagged(
    model: torch.nn.Module,
    samples: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    names: Sequence[str],
) -> SamplePredictions:
    """Return each text, its labels, and the predicted ones, in the order of the words; -100 is no label."""
    rows: list[list[str]] = []
    for batch in _batches(samples):
        inputs = collate(_accepted(model, batch))
        on_device = {name: value.to(_device(model)) for name, value in inputs.items() if name != "labels"}
        found = model(**on_device).logits.argmax(dim=-1).cpu()
        for sample, given, guessed in zip(batch, inputs["labels"].cpu(), found, strict=True):
            tags = [" ".join(names[i] for i in ids[given >= 0].tolist()) for ids in (given, guessed)]
            rows.append([tokenizer.decode(sample["input_ids"], skip_special_tokens=True), *tags])
    return SamplePredictions(columns=COLUMNS, rows=rows)


def written(
    model: torch.nn.Module,
    samples: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    generate: Generate,
) -> SamplePredictions:
    """Return the text that the model writes for each text that it reads."""
    rows: list[list[str]] = []
    for batch in _batches(samples):
        inputs = collate(_accepted(model, batch))
        found = generate(model, {name: value.to(_device(model)) for name, value in inputs.items()})
        for sample, new in zip(batch, found.cpu(), strict=True):
            texts = (sample["input_ids"], [token for token in sample["labels"] if token >= 0], new)
            rows.append([tokenizer.decode(ids, skip_special_tokens=True) for ids in texts])
    return SamplePredictions(columns=COLUMNS, rows=rows)


def _accepted(model: torch.nn.Module, batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the samples with only the keys that the model's forward takes."""
    names = inspect.signature(unwrap_peft_model(model).forward).parameters
    return [{name: value for name, value in sample.items() if name in names} for sample in batch]


def _batches(samples: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(samples), BATCH_SIZE):
        yield samples[start : start + BATCH_SIZE]


def continuations(
    model: torch.nn.Module, prompts: Sequence[list[int]], num_tokens: int, tokenizer: Any, **drawn: float
) -> list[list[int]]:
    """
    Return up to `num_tokens` tokens for each prompt; padding follows the end of a text.

    With temperature and the like in `drawn` they are drawn and not the likeliest. Then there are always so many, the
    end of a text among them: ranks that write together, each with its part of the weights, make the same forwards.
    """
    if num_tokens == 0:
        return [[] for _ in prompts]
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    inputs = _padded([torch.tensor(prompt) for prompt in prompts], padding or 0, "left", model)
    # Not passed as an argument: the model's own settings of sampling would be merged into it, or warned about.
    settings: Any = model.generation_config
    how = {"do_sample": True, "top_k": 0, **drawn} if drawn else {"eos_token_id": settings.eos_token_id}
    model.generation_config = GenerationConfig(max_new_tokens=num_tokens, pad_token_id=padding, **how)
    try:
        output = model.generate(**inputs, use_cache=True)  # type: ignore[operator]
    finally:
        model.generation_config = settings
    new: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
    return new


def _padded(texts: Sequence[torch.Tensor], padding: int, side: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    padded = {
        "input_ids": pad_sequence(list(texts), batch_first=True, padding_value=padding, padding_side=side),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in texts], batch_first=True, padding_side=side),
    }
    return {name: value.to(_device(model)) for name, value in padded.items()}


def _special(sample: Mapping[str, Any], tokenizer: Any) -> torch.Tensor:
    """Return which tokens are special, no text: (tokens,) of bool."""
    mask = sample.get("special_tokens_mask")
    if mask is None:
        mask = tokenizer.get_special_tokens_mask(list(sample["input_ids"]), already_has_special_tokens=True)
    return torch.tensor(mask).bool()


def _hidden(special: torch.Tensor, share: float) -> torch.Tensor:
    """Return which tokens to hide: a share of the text's, at least one; (tokens,) of bool."""
    draws = torch.rand(len(special), generator=torch.Generator().manual_seed(0)).masked_fill(special, 2.0)
    count = min(max(1, round(share * int((~special).sum()))), int((~special).sum()))
    hidden = torch.zeros_like(special)
    hidden[draws.argsort()[:count]] = True
    return hidden


def _names(labels: Labels, chosen: Sequence[Any]) -> str:
    return ", ".join(name for name, is_chosen in zip(labels.names, chosen, strict=True) if is_chosen)


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
