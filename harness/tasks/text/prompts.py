"""
What a model writes while it is trained.

For the prompts of --generate_steps always the likeliest token; for --generate_samples tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig

from harness.errors import ConfigError
from harness.tasks import Complete, Draw
from harness.tasks.flags import TaskConfig
from harness.tasks.predictions import BATCH_SIZE, continuations
from harness.tasks.pretrained import longest_sequence
from harness.tasks.text.flags import prompts_of

# What a model needs to begin and to end a text, or to write it in a language.
KEPT = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id"),
)


def continuing(config: TaskConfig, tokenizer: Any, model: Any) -> Complete:
    """Return the function that continues prompts. Raises ConfigError for prompts that leave no room for a token."""
    limit, most = longest_sequence(tokenizer, model.config), config.generate_max_new_tokens
    for prompt in prompts_of(config):
        if not 0 < (count := len(_ids(prompt, tokenizer))) < limit:
            raise ConfigError(
                f"--generate_prompts: {prompt!r} has {count} tokens, and the model takes up to {limit} with those that "
                "it writes; use another prompt."
            )

    def complete(model: torch.nn.Module, prompts: Sequence[str]) -> list[str]:
        texts: list[str] = []
        for batch in _batches([_ids(prompt, tokenizer) for prompt in prompts]):
            room = limit - max(len(ids) for ids in batch)
            new = continuations(model, batch, min(most, room), tokenizer)
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    return complete


def drawing(config: TaskConfig, tokenizer: Any, model: Any, samples: Iterable[Mapping[str, Any]]) -> Draw:
    """
    Return the function that draws the texts of --generate_samples.

    They continue the prompts, else the first tokens of the `samples`, else the token that begins a text. Raises
    ConfigError if that leaves no room for a token, or there is no such token.
    """
    limit, most, count = (
        longest_sequence(tokenizer, model.config),
        config.generate_max_new_tokens,
        config.generate_samples,
    )
    size = config.generate_prompt_tokens
    prompts = [_ids(prompt, tokenizer) for prompt in prompts_of(config)]
    if size >= limit:
        raise ConfigError(
            f"--generate_prompt_tokens={size}: the model takes up to {limit} tokens with those that it writes; use "
            "fewer."
        )
    if count is not None and not (prompts or size):
        prompts = [[_first_token(tokenizer, model)]]
    numbers = {"temperature": config.generate_temperature, "top_p": config.generate_top_p}

    def draw(model: torch.nn.Module) -> list[tuple[str, str]]:
        beginnings = [list(row["input_ids"])[:size] for row in islice(iter(samples), count)] if size else prompts
        repeated = [ids for ids in beginnings for _ in range(1 if size else count or 1)]
        ends = _ends(tokenizer, model)
        texts: list[tuple[str, str]] = []
        for batch in _batches(repeated):
            room = limit - max(len(ids) for ids in batch)
            new = [_up_to(ends, ids) for ids in continuations(model, batch, min(most, room), tokenizer, **numbers)]
            shown = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (batch, new))
            texts += zip(*shown, strict=True)
        return texts

    return draw


def _first_token(tokenizer: Any, model: Any) -> int:
    """Return the token that begins a text, or that ends the one before. Raises ConfigError if there is none."""
    for owner in (tokenizer, model.config):
        for name in ("bos_token_id", "eos_token_id"):
            found = getattr(owner, name, None)
            if isinstance(found, int):
                return found
    raise ConfigError(
        f"--generate_samples: the tokenizer {tokenizer.name_or_path} has no token that begins or ends a text; give "
        "--generate_prompts or --generate_prompt_tokens."
    )


def _ends(tokenizer: Any, model: Any) -> set[int]:
    """Return the tokens that end a text."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])} - {None}


def _up_to(ends: set[int], ids: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def answering(config: TaskConfig, tokenizer: Any, *, most_tokens: int) -> Complete:
    """Return the function that writes a text for each prompt that an encoder reads, --source_prefix before it."""
    prefix, most = config.source_prefix or "", config.generate_max_new_tokens

    def complete(model: Any, prompts: Sequence[str]) -> list[str]:
        settings = model.generation_config
        kept = {name: getattr(settings, name, None) for name in KEPT}
        if kept["decoder_start_token_id"] is None:
            kept["decoder_start_token_id"] = getattr(model.config, "decoder_start_token_id", None)
        texts: list[str] = []
        # Not passed as arguments: the model's own settings of sampling would be merged into them, or warned about.
        model.generation_config = GenerationConfig(max_new_tokens=most, **kept)
        try:
            for batch in _batches([prefix + prompt for prompt in prompts]):
                inputs = tokenizer(batch, padding=True, truncation=True, max_length=most_tokens, return_tensors="pt")
                names = ("input_ids", "attention_mask")
                given = {name: inputs[name].to(next(model.parameters()).device) for name in names}
                texts += tokenizer.batch_decode(model.generate(**given, use_cache=True), skip_special_tokens=True)
        finally:
            model.generation_config = settings
        return texts

    return complete


def _ids(prompt: str, tokenizer: Any) -> list[int]:
    """Return a prompt's tokens, without one that would end the text."""
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _batches(items: Sequence[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), BATCH_SIZE):
        yield list(items[start : start + BATCH_SIZE])
