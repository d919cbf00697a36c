"""Count the operations that a model takes for its tokens, by its parameters and its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from harness.distributed.sharding import num_parameters, whole_shape

# Kinds of a layer in a configuration's `layer_types` in which tokens do not look at all others before them.
WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")
# What configurations call the number of experts, and of those that a token goes through.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts")


@dataclass(frozen=True, kw_only=True)
class Flops:
    """
    Operations of forward and backward: `per_token`, and `per_pair` for each two tokens of a document.

    A document of n tokens takes n * per_token + n**2 * per_pair: PaLM's 6N + 12LHQT. N are the parameters that a matrix
    product uses: a head that shares the embeddings' weights is among them, embeddings that are only looked up and
    experts that a token does not go through are not. As is the custom, causal attention counts in full, and so does
    one with a sliding window; recomputed activations do not count, and frozen weights do.
    """

    per_token: int
    per_pair: int


def flops_of(model: torch.nn.Module) -> Flops | None:
    """Return the operations of a model of tokens; None for two stacks (encoder and decoder), or without a config."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads, width = (
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    plain = num_parameters(model, exclude_embeddings=True)
    if not (plain and layers and width and isinstance(heads, int)) or getattr(config, "is_encoder_decoder", False):
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        layers = sum(kind not in WITHOUT_ATTENTION for kind in kinds)
    of_head = getattr(config, "head_dim", None) or width // heads
    parameters = plain + _shared_head(model) - _idle_experts(model, config)
    return Flops(per_token=6 * parameters, per_pair=12 * layers * heads * of_head)


def _shared_head(model: torch.nn.Module) -> int:
    """Return the elements of a head that shares the weights of the embeddings, which `num_parameters` leaves out."""
    ends = [getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
    weights: list[Any] = [getattr(each, "weight", None) for each in ends]
    looked_up, head = weights
    return whole_shape(head).numel() if head is not None and head is looked_up else 0


def _idle_experts(model: torch.nn.Module, config: Any) -> int:
    """Return the elements of the experts that a token does not go through."""
    experts, chosen = (
        next((value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0), None)
        for names in (EXPERTS, CHOSEN)
    )
    if experts is None or chosen is None:
        return 0
    held = sum(whole_shape(each).numel() for name, each in model.named_parameters() if ".experts." in name)
    return held - held * chosen // experts
