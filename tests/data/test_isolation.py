"""Documents in a packed row do not see each other: their losses are those of them alone, or the model is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from harness.data.isolation import check_isolation, without_look_for_padding
from harness.data.packing import collate_rows, row_of
from harness.errors import ConfigError
from harness.tasks.text.documents import pad
from harness.training.flags import ModelingConfig
from harness.training.loss import Loss, prepare_model

VOCABULARY, LENGTH = 61, 48
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SHAPE |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY},
    "llama": SHAPE,
    "mistral": {**SHAPE, "sliding_window": 5, "num_key_value_heads": 1},
    "qwen3": {**SHAPE, "head_dim": 16, "num_key_value_heads": 1},
    "gpt_neox": SHAPE,
}
ATTENDS_ACROSS: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": VOCABULARY, "state_size": 4},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY},
    "opt": {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bert": {**SHAPE, "is_decoder": True},
}


def model_of(kind: str, shape: dict[str, Any], *, attention: str | None = None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    options = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), **options)


def loss_of(model: Any, **modeling: Any) -> Loss:
    accelerator = Accelerator(cpu=True)
    config = ModelingConfig(**modeling)
    prepare_model(model, config, None, accelerator)
    return Loss(model, config, accelerator, None)


def check(model: Any, *, max_length: int = LENGTH, num_rows: int = 8, **modeling: Any) -> None:
    check_isolation(model, loss_of(model, **modeling), max_length=max_length, num_rows=num_rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_packed_and_unpacked_losses_and_gradients_agree(kind: str, attention: str) -> None:
    draw = np.random.default_rng(3)
    lengths = [[17, 2, 9, 20], [30, 11], [40]]
    rows = [[{"input_ids": draw.integers(1, VOCABULARY, n)} for n in row] for row in lengths]
    together = collate_rows([row_of(row) for row in rows], max_length=LENGTH, pad_token_id=0)
    apart = pad([document for row in rows for document in row], pad_token_id=0)
    found = []
    for batch in (together, apart):
        model = model_of(kind, MODELS[kind], attention=attention)
        loss = loss_of(model)
        model.eval()
        (share,) = loss.shares(model, [batch])
        value, _ = loss(model, batch, share)
        value.backward()
        found.append((float(value.detach()), {name: each.grad for name, each in model.named_parameters()}))
        assert int(loss.targets.count(batch)) == sum(n - 1 for row in lengths for n in row)
    (packed, of_packed), (padded, of_padded) = found
    assert packed == pytest.approx(padded, rel=1e-6)
    for name, gradient in of_packed.items():
        torch.testing.assert_close(gradient, of_padded[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_models_that_keep_documents_apart_are_taken(kind: str, attention: str) -> None:
    for max_length in (3, 4, 7, LENGTH):
        check(model_of(kind, MODELS[kind], attention=attention), max_length=max_length)


@pytest.mark.parametrize("kind", ATTENDS_ACROSS)
def test_models_that_do_not_are_refused_by_what_they_do(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"--packing does not go with a {kind} model.*: .*Leave --packing out"):
        check(model_of(kind, ATTENDS_ACROSS[kind]))


def test_a_cache_makes_documents_see_each_other_and_is_found() -> None:
    with pytest.raises(ConfigError, match="a document sees the one before it"):
        check(model_of("gpt2", MODELS["gpt2"]), use_cache=True)


def test_positions_that_do_not_begin_anew_are_found() -> None:
    model = model_of("gpt2", MODELS["gpt2"])
    forward = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda positions: forward(torch.arange(positions.shape[-1]).expand_as(positions))
    with pytest.raises(ConfigError, match="logits in a row are not those of it alone"):
        check(model)


class Bag(nn.Module):
    """Logits of each token alone, of no use to a language model; with `leaks` the row's mean is in them."""

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        self.embedding, self.head, self.leaks = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY), leaks

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        hidden = self.embedding(input_ids)
        if self.leaks:
            hidden = hidden + 1e-12 * hidden.mean(dim=1, keepdim=True)
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Known(Bag):
    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding


def test_a_model_of_ones_own_is_tried_too_and_the_smallest_leak_is_found() -> None:
    check(Known(leaks=False))
    with pytest.raises(ConfigError, match="a Known model: a document sees the one before it"):
        check(Known(leaks=True))
    with pytest.raises(ConfigError, match="get_input_embeddings"):
        check(Bag(leaks=False))


def test_the_trial_leaves_modes_gradients_buffers_and_generators_as_they_were() -> None:
    model = model_of("gpt2", MODELS["gpt2"])
    loss = loss_of(model)
    model.train()
    before = torch.get_rng_state()
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    check_isolation(model, loss, max_length=LENGTH, num_rows=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(each.grad is None for each in model.parameters())
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("precision", ["bf16", "weights"])
def test_half_precision_is_tried_as_it_is(precision: str) -> None:
    model = model_of("llama", MODELS["llama"])
    if precision == "weights":
        check(model.bfloat16())
        return
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepare_model(model, ModelingConfig(), None, accelerator)
    loss = Loss(model, ModelingConfig(), accelerator, None)
    check_isolation(accelerator.prepare_model(model), loss, max_length=LENGTH, num_rows=2)


def test_rows_that_are_padded_are_not_looked_through_for_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*_: Any) -> None:
        raise AssertionError("a model waits for the device to find out what positions say")

    model = model_of("gpt2", {**MODELS["gpt2"], "pad_token_id": 0})
    monkeypatch.setattr(type(model.transformer), "warn_if_padding_and_no_attention_mask", look)
    rows = collate_rows([row_of([{"input_ids": [5, 6, 7]}])], max_length=8, pad_token_id=0)
    with pytest.raises(AssertionError, match="waits for the device"):
        model(**rows)
    without_look_for_padding(model)
    assert model(**rows).loss.isfinite()
