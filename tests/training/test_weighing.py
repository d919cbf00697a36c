"""What is learned of a model's loss, and that the loss and the gradient of a batch are those of its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from harness.config import release
from harness.model.adapters import add_adapter
from harness.model.flags import AdapterConfig
from harness.training.flags import ModelingConfig
from harness.training.loss import Loss
from harness.training.weighing import BATCHES, SAMPLES, SHIFTED_TOKENS, TOKENS, TRIES, Repeated, Weighing, take

Batch = dict[str, torch.Tensor]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPLITS = ([8], [4, 4], [3, 3, 2], [7, 1], [1] * 8)
SUMS = Weighing(sums=True, means=False, by=TOKENS)


def mean_of(by: str) -> Weighing:
    return Weighing(sums=False, means=True, by=by)


def texts(share: float = 1.0) -> Batch:
    """Eight texts of unequal lengths; a `share` of their tokens are targets."""
    ids = torch.randint(3, 99, (8, 12))
    mask = torch.arange(12) < torch.tensor([12, 3, 9, 5, 12, 7, 4, 10]).unsqueeze(1)
    labels = torch.where(mask & (torch.rand(8, 12) < share), ids, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def with_labels(labels: Callable[[], torch.Tensor]) -> Callable[[], Batch]:
    return lambda: {**texts(), "labels": labels()}


def classes() -> torch.Tensor:
    return torch.randint(0, 3, (8,))


def images() -> Batch:
    return {"pixel_values": torch.randn(8, 3, 8, 8), "labels": classes()}


def vectors() -> Batch:
    return {"x": torch.randn(8, 5), "labels": classes()}


def bert(kind: Any, **config: Any) -> Callable[[], torch.nn.Module]:
    return lambda: kind(BertConfig(vocab_size=99, **SIZE, **STILL, **config))


def gpt2() -> torch.nn.Module:
    dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=16, n_embd=32, n_layer=2, n_head=2, **dropout))


def t5() -> torch.nn.Module:
    size = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=99, dropout_rate=0.0, decoder_start_token_id=0, **size))


def mixtral() -> torch.nn.Module:
    # Three experts, of which two work: the router's loss is no mean over parts of a batch.
    experts = {"num_key_value_heads": 2, "output_router_logits": True, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(vocab_size=99, **SIZE, **experts))


def vit() -> torch.nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZE, **STILL))


def lora() -> torch.nn.Module:
    model = bert(BertForSequenceClassification, num_labels=3)()
    return add_adapter(model, AdapterConfig(use_peft=True, lora_dropout=0.0))


def compiled() -> torch.nn.Module:
    model: Any = torch.compile(bert(BertForMaskedLM)(), backend="eager")
    return model


class Normed(torch.nn.Module):
    """A classifier with a batch norm, and so with a loss that depends on what else is in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class Contrastive(Normed):
    """Each sample's negatives are the others of its batch."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.layers[0](x) @ x.mean() @ x.T if x.ndim < 2 else self.layers[0](x) @ self.layers[0](x).T
        return {"loss": cross_entropy(scores, torch.arange(len(x)))}


def next_tokens(outputs: Any, labels: torch.Tensor, reduction: str) -> torch.Tensor:
    return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


def mean_loss(outputs: Any, labels: Any, _: Any) -> torch.Tensor:
    return next_tokens(outputs, labels, "mean")


def summed_loss(outputs: Any, labels: Any, num_items: Any) -> torch.Tensor:
    return next_tokens(outputs, labels, "sum") / num_items


def mixed_loss(outputs: Any, labels: Any, num_items: Any) -> torch.Tensor:
    return summed_loss(outputs, labels, num_items) + 0.1 * outputs.logits.pow(2).mean()


CASES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], Batch], dict[str, Any], Weighing]] = {
    "BERT, classes": (bert(BertForSequenceClassification, num_labels=3), with_labels(classes), {}, mean_of(SAMPLES)),
    "BERT, numbers": (
        bert(BertForSequenceClassification, num_labels=1),
        with_labels(lambda: torch.randn(8)),
        {},
        mean_of(SAMPLES),
    ),
    "BERT, several labels": (
        bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
        with_labels(lambda: torch.randint(0, 2, (8, 3)).float()),
        {},
        mean_of(SAMPLES),
    ),
    "BERT, masked": (bert(BertForMaskedLM), lambda: texts(0.3), {}, mean_of(TOKENS)),
    "BERT, tags": (bert(BertForTokenClassification, num_labels=99), texts, {}, mean_of(TOKENS)),
    "BERT, smoothed": (
        bert(BertForSequenceClassification, num_labels=3),
        with_labels(classes),
        {"label_smoothing_factor": 0.1},
        Weighing(sums=True, means=False, by=SAMPLES),
    ),
    "BERT, LoRA": (lora, with_labels(classes), {}, mean_of(SAMPLES)),
    "BERT, compiled": (compiled, lambda: texts(0.3), {}, mean_of(TOKENS)),
    "T5": (t5, texts, {}, mean_of(TOKENS)),
    "ViT": (vit, images, {}, Weighing(sums=True, means=False, by=SAMPLES)),
    "GPT-2": (gpt2, texts, {}, SUMS),
    "GPT-2, smoothed": (gpt2, texts, {"label_smoothing_factor": 0.1}, SUMS),
    "own mean": (gpt2, texts, {"loss": mean_loss}, mean_of(SHIFTED_TOKENS)),
    "own sum": (gpt2, texts, {"loss": summed_loss}, SUMS),
    "own sum and mean": (gpt2, texts, {"loss": mixed_loss}, Weighing(sums=True, means=True, by=SAMPLES)),
}


def parts_of(batch: Batch, split: Sequence[int]) -> list[dict[str, Any]]:
    ends = torch.tensor(split).cumsum(0).tolist()
    return [take(batch, range(end - size, end)) for end, size in zip(ends, split, strict=True)]


def step(loss: Loss, model: torch.nn.Module, window: Sequence[Any]) -> tuple[float, torch.Tensor]:
    """The loss of a step, and its gradient as one vector in float64."""
    model.zero_grad()
    total = 0.0
    for batch, share in zip(window, loss.shares(model, window), strict=True):
        part, _ = loss(model, batch, share)
        part.backward()
        total += part.item()
    return total, torch.cat([each.grad.double().flatten() for each in model.parameters() if each.grad is not None])


def made(case: str) -> tuple[torch.nn.Module, Batch, Loss]:
    if "smoothed" in case and release("transformers") < (5, 15):
        pytest.skip("--label_smoothing_factor needs transformers 5.15")
    if "compiled" in case and release("torch") < (2, 7):
        pytest.skip("the compiler of torch 2.6 fails in transformers' BERT")
    torch.manual_seed(0)
    build, data, options, _ = CASES[case]
    flags = {name: value for name, value in options.items() if name != "loss"}
    model = build().train()
    return model, data(), Loss(model, ModelingConfig(**flags), Accelerator(cpu=True), options.get("loss"))


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_of_a_step_do_not_depend_on_its_micro_batches(case: str) -> None:
    model, batch, loss = made(case)
    whole, gradient = step(loss, model, [batch])
    assert loss.weighing == CASES[case][-1]
    for split in SPLITS[1:]:
        total, of_parts = step(loss, model, parts_of(batch, split))
        assert total == pytest.approx(whole, rel=1e-6), split
        assert (of_parts - gradient).norm() <= 1e-5 * gradient.norm(), split


@pytest.mark.parametrize("case", CASES)
def test_a_batch_that_is_repeated_weighs_nothing(case: str) -> None:
    model, batch, loss = made(case)
    whole, gradient = step(loss, model, [batch])
    total, of_parts = step(loss, model, [*parts_of(batch, [5, 3]), Repeated(take(batch, [0, 1]))])
    assert total == pytest.approx(whole, rel=1e-6)
    assert (of_parts - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("case", ["BERT, masked", "BERT, tags", "T5", "own mean", "GPT-2"])
def test_a_batch_without_a_token_that_counts_weighs_nothing(case: str) -> None:
    model, batch, loss = made(case)
    whole, gradient = step(loss, model, [batch])
    empty = {**take(batch, [0, 1]), "labels": torch.full((2, 12), -100)}
    total, of_parts = step(loss, model, [empty, batch])
    assert total == pytest.approx(whole, rel=1e-6)
    assert (of_parts - gradient).norm() <= 1e-5 * gradient.norm()
    nothing, of_nothing = step(loss, model, [empty])
    assert nothing == 0
    assert not of_nothing.any()


@pytest.mark.parametrize("case", CASES)
def test_learning_takes_few_small_forwards_and_leaves_everything_as_it_was(case: str) -> None:
    model, batch, loss = made(case)
    torch.manual_seed(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state, sizes = torch.get_rng_state(), []

    def note(_: Any, inputs: Any, keywords: dict[str, torch.Tensor]) -> None:
        sizes.append(len(next(iter(keywords.values()))))

    hook = getattr(model, "_orig_mod", model).register_forward_pre_hook(note, with_kwargs=True)
    loss.shares(model, [batch])
    hook.remove()
    assert 2 <= len(sizes) <= 5
    assert max(sizes) <= 4
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    loss.shares(model, [batch])
    assert len(sizes) <= 5, "once is enough"


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("own")])
def test_a_batch_of_one_is_known_too(case: str) -> None:
    model, batch, loss = made(case)
    loss.learn(model, [take(batch, [0])])
    assert loss.weighing == CASES[case][-1]


@pytest.mark.parametrize(
    ("build", "data", "says"),
    [
        (Normed, vectors, "Expected more than 1 value per channel"),
        (Contrastive, vectors, "the loss of a batch is no mean of its parts' by samples nor by tokens"),
        (mixtral, texts, "the loss of a batch is no mean of its parts' by shifted tokens nor by tokens nor by samples"),
    ],
)
def test_where_nothing_fits_one_line_says_so_and_batches_are_averaged(
    build: Callable[[], torch.nn.Module], data: Callable[[], Batch], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, batch = build().train(), data()
    buffers = [buffer.clone() for buffer in model.buffers()]
    loss = Loss(model, ModelingConfig(), Accelerator(cpu=True), None)
    first, second = loss.shares(model, parts_of(batch, [6, 2]))
    assert loss.weighing is not None
    assert loss.weighing.by == BATCHES
    assert first.over == second.over == 2
    assert [says in record.getMessage() for record in caplog.records] == [True]
    assert all(torch.equal(now, before) for now, before in zip(model.buffers(), buffers, strict=True))


def test_what_was_learned_is_not_learned_again_after_a_resume() -> None:
    model, batch, loss = made("BERT, masked")
    loss.shares(model, [batch])
    resumed = made("BERT, masked")[-1]
    resumed.load_state_dict(loss.state_dict())
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    resumed.shares(model, [batch])
    assert (resumed.weighing, forwards) == (loss.weighing, [])


def test_where_all_samples_are_alike_what_weighs_is_learned_from_later_ones() -> None:
    model, batch, loss = made("own sum and mean")
    alike = {**take(batch, [0, 4]), "labels": batch["input_ids"][[0, 4]]}
    for _ in range(3):
        loss.shares(model, [alike, alike])
        assert loss.weighing is None
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    loss.shares(model, [alike, batch])
    hook.remove()
    assert loss.weighing == CASES["own sum and mean"][-1]
    assert len(passes) == 3


def test_samples_that_stay_alike_are_looked_at_a_few_times_only() -> None:
    model, batch, loss = made("own mean")
    alike = {**take(batch, [0, 4]), "labels": batch["input_ids"][[0, 4]]}
    for _ in range(TRIES):
        assert loss.weighing is None
        loss.shares(model, [alike])
    assert loss.weighing == mean_of(TOKENS)


def test_shifted_tokens_that_divide_a_batch_as_its_samples_do_are_not_taken_for_them() -> None:
    model, batch, loss = made("own sum and mean")
    few = take(batch, [0, 2, 4, 7])
    # With half of the first's eight left out: 4 and 15 tokens, 4 and 12 without each sample's first, 1 and 3 samples.
    few["labels"] = torch.where(torch.arange(12) < torch.tensor([8, 5, 5, 5]).unsqueeze(1), few["input_ids"], -100)
    loss.shares(model, [few])
    assert loss.weighing == CASES["own sum and mean"][-1]
