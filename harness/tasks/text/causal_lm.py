"""Causal language modelling: predict the next token of running text, as Transformers' run_clm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, default_data_collator

from harness.errors import ConfigError
from harness.tasks import Task
from harness.tasks.flags import TaskConfig
from harness.tasks.predictions import continued
from harness.tasks.pretrained import check_length, load_config, load_model, load_tokenizer, longest_sequence
from harness.tasks.rows import load_splits
from harness.tasks.scores.classification import TokenAccuracy
from harness.tasks.splits import Split, grouped, texts_of
from harness.tasks.text import documents
from harness.tasks.text.prompts import continuing, drawing

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 16
PROBE_TOKENS = 8
SAMPLE_TOKENS = 60


def build(config: TaskConfig) -> Task:
    """
    Read text, cut it into blocks of --block_size tokens, or into documents, and load or make the model.

    A block holds input_ids, attention_mask and labels, (block_size,) each; the model shifts the labels. A document
    holds its input_ids, up to --max_length. Raises ConfigError for input that the user can correct.
    """
    tokenizer = load_tokenizer(config)
    model_config = load_config(config, tokenizer)
    size = _size(config, tokenizer, model_config)
    splits = load_splits(config, keep_linebreaks=config.keep_linebreaks).hold_out(config)
    columns = splits.text_columns(config)
    cut = _blocks if config.max_length is None else _documents
    blocks = splits.map(lambda split: cut(split, config, columns, tokenizer, size)).cut(config)
    model = load_model(config, AutoModelForCausalLM, model_config, tokenizer)
    shown = blocks.rows("validation" if "validation" in blocks else "train")
    writes = hasattr(model, "generate")
    return Task(
        model=model,
        train_dataset=blocks.rows("train"),
        eval_dataset=blocks.rows("validation"),
        test_dataset=blocks.rows("test"),
        data_collator=default_data_collator if config.max_length is None else _padding(tokenizer),
        processing_class=tokenizer,
        check=lambda model: check_causal(model, next(iter(shown))["input_ids"]),
        metrics=lambda: TokenAccuracy(shift=1),
        sample=lambda model: _continued(model, tokenizer, next(iter(shown))["input_ids"]),
        predict_samples=partial(continued, tokenizer=tokenizer) if writes else None,
        complete=continuing(config, tokenizer, model) if writes else None,
        draw=drawing(config, tokenizer, model, shown) if writes else None,
    )


def _size(config: TaskConfig, tokenizer: Any, model_config: Any) -> int:
    """Return the most tokens of a sample. Raises ConfigError for more than the model takes."""
    if config.max_length is not None:
        check_length("max_length", config.max_length, tokenizer, model_config)
        return config.max_length
    if config.block_size is None:
        return min(longest_sequence(tokenizer, model_config), 1024)
    check_length("block_size", config.block_size, tokenizer, model_config)
    return config.block_size


def _padding(tokenizer: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
    """Return the collator of documents; their masks hide what pads, so without a token for it any will do."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return partial(documents.pad, pad_token_id=token or 0)


def _tokeniser(config: TaskConfig, columns: Sequence[str], tokenizer: Any) -> Callable[[Any], dict[str, Any]]:
    delimiter, end = config.text_column_delimiter, _end_of_texts(config, tokenizer)

    def tokenised(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        texts = [f"{text.removesuffix(end)}{end}" for text in texts_of(batch, columns, delimiter)]
        # No warning for texts that are longer than the model takes: they are cut afterwards.
        return dict(tokenizer(texts, verbose=False))

    return tokenised


def _documents(split: Split, config: TaskConfig, columns: Sequence[str], tokenizer: Any, size: int) -> Split:
    return documents.documents(split, config, _tokeniser(config, columns, tokenizer), size)


def _blocks(split: Split, config: TaskConfig, columns: Sequence[str], tokenizer: Any, size: int) -> Split:
    tokenised = _tokeniser(config, columns, tokenizer)

    def cut_to_blocks(batch: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Any]:
        blocks = grouped(batch, size)
        return {**blocks, "labels": [list(ids) for ids in blocks["input_ids"]]}

    blocks = split.transform(tokenised, config).transform(cut_to_blocks, config, keep_columns=True)
    blocks.require_samples(f"fewer tokens than one block of {size}; lower --block_size or give more text.")
    return blocks


def _end_of_texts(config: TaskConfig, tokenizer: Any) -> str:
    """Return what --append_eos puts behind each text, if the tokenizer does not do so. Raises ConfigError."""
    if not config.append_eos:
        return ""
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"--append_eos: the tokenizer {tokenizer.name_or_path} has no token that ends texts; leave it out, or give "
            "it one and save it."
        )
    ends_so = tokenizer("a", verbose=False)["input_ids"][-1:] == [tokenizer.eos_token_id]
    return "" if ends_so else str(tokenizer.eos_token)


def check_causal(model: Any, block: Sequence[int]) -> None:
    """
    Raise ConfigError for a model that sees the tokens which it is to predict, as BERT does.

    In a causal model the gradient of the earlier logits with respect to a later token's embedding is exactly zero.
    Costs a forward of some tokens; random state, buffers, modes and gradients are as before. A model that can't be
    asked so (its weights are partitioned, its attention runs on a GPU alone) passes.
    """
    ids = torch.tensor([list(block)[:PROBE_TOKENS]])
    if ids.shape[1] < 2 or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    try:
        gradient = _gradient_of_earlier_logits(model, ids.to(next(model.parameters()).device))
        if gradient.shape[:2] == ids.shape[::-1]:  # XLNet's batches stand second
            gradient = gradient.transpose(0, 1)
        later = gradient[:, ids.shape[1] // 2 :]
        sees_later = bool(((later != 0) & later.isfinite()).any())
    except Exception as error:  # a model may raise anything on what is not its usual input
        logger.info("Whether the model is causal could not be tried: %s", error)
        return
    if sees_later:
        raise ConfigError(
            f"A {model.config.model_type} model sees the tokens after the one that it is to predict, so causal-lm "
            "would teach it nothing: give --config_overrides is_decoder=true if its type has that, another model, or "
            "--task masked-lm."
        )


def _gradient_of_earlier_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the first half's logits with respect to all tokens' embeddings, (1, tokens, size)."""
    embeddings: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = {module: module.training for module in model.modules()}
    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        model.eval()
        with torch.random.fork_rng(devices=[] if ids.device.type == "cpu" else [ids.device]), torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            earlier = logits[:, : ids.shape[1] // 2].float()
            # Weights that differ from logit to logit: a plain sum could be the same whatever the tokens are.
            weights = torch.linspace(0.5, 1.5, earlier.numel(), device=earlier.device).reshape(earlier.shape)
            (gradient,) = torch.autograd.grad((earlier * weights).sum(), embeddings[:1])
    finally:
        handle.remove()
        for module, mode in was_training.items():
            module.training = mode
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    return gradient


def _continued(model: torch.nn.Module, tokenizer: Any, block: Sequence[int]) -> str:
    """Return the start of a block with the model's continuation; the global random state is restored afterwards."""
    limit = longest_sequence(tokenizer, model.config)
    prompt = list(block)[: max(1, min(PROMPT_TOKENS, limit // 2))]
    device = next(model.parameters()).device
    input_ids = torch.tensor([prompt], device=device)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(
            devices=[] if device.type == "cpu" else [device],
            device_type="cuda" if device.type == "cpu" else device.type,
        ):
            torch.manual_seed(0)
            output = model.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=min(SAMPLE_TOKENS, limit - len(prompt)),
                do_sample=True,
                temperature=0.8,
                top_k=50,
                pad_token_id=padding,
            )[0]
    finally:
        model.train(was_training)
    continuation = tokenizer.decode(output[len(prompt) :], skip_special_tokens=True)
    return f"{tokenizer.decode(prompt, skip_special_tokens=True)} -> {continuation}"
