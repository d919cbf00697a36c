"""The operations that a model is said to take are those that torch counts in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from harness.model.flops import Flops, flops_of

WORDS, LENGTH, BATCH = 512, 96, 2
EAGER = {"attn_implementation": "eager"}
LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    **EAGER,
}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=3, n_head=4, n_positions=LENGTH, **EAGER))


def bert() -> PreTrainedModel:
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160}
    return BertForMaskedLM(BertConfig(vocab_size=WORDS, **shape, **EAGER))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def counted(model: PreTrainedModel) -> int:
    """By torch, in the matrix products of a forward and a backward pass over BATCH documents of LENGTH."""
    tokens = torch.randint(0, WORDS, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("build", [gpt2, bert, llama])
def test_forward_and_backward_take_what_torch_counts(build: Callable[[], PreTrainedModel]) -> None:
    """To 3 %: biases and norms, which a matrix product does not have, are more of a small model than of a large one."""
    model = build().train()
    found = flops_of(model)
    assert found is not None
    tokens = BATCH * LENGTH
    assert found.per_token * tokens + found.per_pair * tokens * LENGTH == pytest.approx(counted(model), rel=0.03)


def test_a_head_of_its_own_counts_as_one_that_shares_the_embeddings() -> None:
    tied, untied = (LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tie)) for tie in (True, False))
    assert flops_of(tied) == flops_of(untied)


def test_of_experts_those_count_that_a_token_goes_through() -> None:
    shape = {name: value for name, value in LLAMA.items() if name != "head_dim"}
    one, four = (
        flops_of(MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=chosen)))
        for chosen in (1, 4)
    )
    assert one is not None
    assert four is not None
    assert four.per_token - one.per_token == 6 * 3 * 3 * (3 * 64 * 160), "three experts more in each layer"


def test_where_it_is_not_known_nothing_is_said() -> None:
    two_stacks = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    assert flops_of(T5ForConditionalGeneration(T5Config(**two_stacks))) is None
    assert flops_of(torch.nn.Linear(1, 1)) is None


def test_only_layers_with_attention_have_it() -> None:
    model = llama()
    whole = flops_of(model)
    model.config.layer_types = ["full_attention", "linear_attention", "linear_attention"]
    assert whole is not None
    assert flops_of(model) == Flops(per_token=whole.per_token, per_pair=whole.per_pair // 3)
