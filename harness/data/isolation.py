"""Try whether documents in a packed row see each other: a few tokens through the model, before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from harness.data.packing import collate_rows, row_of
from harness.distributed.ranks import agree
from harness.distributed.sharding import is_divided, reshard
from harness.errors import ConfigError
from harness.training.loss import Loss
from harness.training.weighing import untouched

# The most tokens of the two documents, and of what pads the row behind them.
FIRST, SECOND, PADDING = 11, 9, 3
ROWS = 2  # some kernels keep documents apart in a batch of one row alone
# How far the logits of a document in a row and alone may be apart, as a share of the largest: in float32, and else.
EXACT, ROUGH = 1e-3, 5e-2
HALF = (torch.bfloat16, torch.float16)
LOOKS_FOR_PADDING = "warn_if_padding_and_no_attention_mask"
# Below this many tokens a row holds one document.
TWO_DOCUMENTS = 4


@dataclass(frozen=True, kw_only=True)
class Seen:
    """
    What the logits of the second document depend on: float tensors.

    `gradient` is theirs with respect to the embeddings of the row, (rows, tokens, values), of which the `first` tokens
    are of the first document; `in_row` and `alone` are the logits themselves, (rows, tokens, values).
    """

    gradient: torch.Tensor
    first: int
    in_row: torch.Tensor
    alone: torch.Tensor

    @property
    def why_not(self) -> str:
        """What is wrong, in a few words; empty if the second document sees itself alone, and positions begin anew."""
        if bool((self.gradient[:, : self.first] != 0).any()):
            return "a document sees the one before it in its row"
        if not bool((self.gradient[:, self.first : self.first + self.alone.shape[1]] != 0).any()):
            return "a document's logits do not depend on its own tokens, so what it sees can't be told"
        return ""

    def why_other(self, *, tolerance: float) -> str:
        """How the logits differ from those of the document alone, by more than a share of the largest; or empty."""
        most = float(self.alone.abs().max())
        apart = float((self.in_row - self.alone).abs().max())
        if apart <= tolerance * most:
            return ""
        return f"a document's logits in a row are not those of it alone: up to {apart:.2g} apart, of {most:.2g}"


def check_isolation(model: torch.nn.Module, loss: Loss, *, max_length: int, num_rows: int) -> None:
    """
    Collective: raise ConfigError, on all ranks, for a model that lets packed documents see each other.

    `model` is the wrapped one, which is called as the loop calls it, in its precision and with its attention, but for a
    compiler. Of a second document's logits the gradient with respect to the first one's embeddings has to be exactly
    zero, that with respect to its own not, and they have to be, to rounding, those of the document alone. Costs two
    forwards and a backward of some tokens; modes, buffers, gradients and generators are as before.
    """
    if max_length < TWO_DOCUMENTS:
        return
    accelerator = loss.accelerator
    reason: Exception | None = None
    try:
        seen = _look(model, loss, max_length=max_length, num_rows=min(num_rows, ROWS))
        rounds = accelerator.mixed_precision != "no" or any(each.dtype in HALF for each in model.parameters())
        why = seen.why_not or seen.why_other(tolerance=ROUGH if rounds else EXACT)
        if why:
            reason = _refusal(model, why)
    except ConfigError as error:
        reason = error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may raise anything on what is not its usual input
        reason = _refusal(model, f"it can't be tried ({type(error).__name__}: {error})")
    if (found := agree(accelerator, reason)) is not None:
        raise ConfigError(found)


def without_look_for_padding(model: torch.nn.Module) -> None:
    """
    Spare a model of transformers its look for padding where there is no mask: positions say what is padding.

    It would warn of packed rows, and some models (GPT-2) would wait for the device in each forward to find out.
    """
    for module in model.modules():
        if hasattr(module, LOOKS_FOR_PADDING):
            setattr(module, LOOKS_FOR_PADDING, _looks_for_nothing)


def _looks_for_nothing(*_: Any) -> None:
    return


def _refusal(model: torch.nn.Module, why: str) -> ConfigError:
    bare = getattr(model, "module", model)
    config = getattr(bare, "config", None)
    kind = getattr(config, "model_type", None) or type(bare).__name__
    attention = getattr(config, "_attn_implementation", None)
    beside = f" with --attn_implementation {attention}" if attention else ""
    return ConfigError(
        f"--packing does not go with a {kind} model{beside}: {why}. Leave --packing out (--max_length alone pads), or "
        "take another model or --attn_implementation; flash attention takes one row a batch "
        "(--per_device_train_batch_size 1, --per_device_eval_batch_size 1 and a larger --max_length)."
    )


def _look(model: torch.nn.Module, loss: Loss, *, max_length: int, num_rows: int) -> Seen:
    accelerator = loss.accelerator
    bare = model
    if not any(is_divided(parameter) for parameter in model.parameters()):
        # Without the compiler, which would compile for these few tokens alone, and without DeepSpeed's engine, which
        # waits for a backward of its own; it alone can bring weights together that ZeRO-3 has divided.
        bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    embedding = _embedding(bare)
    first = min(FIRST, max_length // 2)
    length = min(SECOND, max_length - first)
    ids = np.random.default_rng(0).integers(0, embedding.num_embeddings, (num_rows, first + length))
    size = min(first + length + PADDING, max_length)
    rows = send_to_device(_batch([[row[:first], row[first:]] for row in ids], size), accelerator.device)
    second = send_to_device(_batch([[row[first:]] for row in ids], length), accelerator.device)
    with untouched(bare, accelerator.device) as redraw:
        redraw()
        with torch.enable_grad(), _kept(embedding) as embedded:
            logits = _logits(loss, bare, rows)[:, first : first + length].float()
            # Weights that differ from logit to logit: a plain sum could be the same whatever the tokens are.
            weights = torch.linspace(0.5, 1.5, logits.numel(), device=logits.device).reshape(logits.shape)
            (gradient,) = torch.autograd.grad((logits * weights).sum(), embedded[:1])
        redraw()
        alone = _logits(loss, bare, second).float()
    reshard(bare)
    return Seen(gradient=gradient.detach(), first=first, in_row=logits.detach(), alone=alone)


def _batch(rows: Sequence[Sequence[Any]], size: int) -> dict[str, torch.Tensor]:
    joined = [row_of([{"input_ids": ids} for ids in documents]) for documents in rows]
    return collate_rows(joined, max_length=size, pad_token_id=0)


def _logits(loss: Loss, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits, (rows, tokens, values). Raises ConfigError for a model that returns none."""
    num_items = loss.targets.count(batch) / torch.ones((), device=loss.accelerator.device)
    _, outputs = loss.compute(model, batch, num_items if loss.takes_num_items(batch) else None)
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
        raise ConfigError("--packing takes a model whose outputs have `logits` of (rows, tokens, values).")
    return logits


def _embedding(model: torch.nn.Module) -> Any:
    """Return the module that makes embeddings of tokens. Raises ConfigError if it can't be found."""
    found = getattr(model, "get_input_embeddings", lambda: None)()
    if not hasattr(found, "num_embeddings"):
        raise ConfigError(
            f"--packing tries whether {type(model).__name__} keeps documents apart by the embeddings of their tokens: "
            "give it a get_input_embeddings() that returns its torch.nn.Embedding."
        )
    return found


@contextmanager
def _kept(embedding: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Keep the embeddings of the forwards in the block, as leaves that have a gradient."""
    embedded: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = embedding.register_forward_hook(keep)
    try:
        yield embedded
    finally:
        handle.remove()
