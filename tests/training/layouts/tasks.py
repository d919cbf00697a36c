"""Tiny models without dropout, one for each way in which losses weigh and divide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peft
import torch
import transformers
from torch.nn.functional import cross_entropy

from harness.tasks import LossFunction, Metrics, Task, TaskConfig
from harness.tasks.scores.classification import LabelScores, MultiLabelScores, RegressionScores, TokenAccuracy
from tests.training.layouts import data

EVALUATED = 21  # no multiple of any layout's round
SHAPE = {"vocab_size": data.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SHAPE, "intermediate_size": 32, "max_position_embeddings": 32}
BERT |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
GPT2 = {"vocab_size": data.VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)}
LLAMA = {**SHAPE, "intermediate_size": 32, "max_position_embeddings": 32, "num_key_value_heads": 2}
MIXTRAL = {**LLAMA, "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1}
T5 = {"vocab_size": data.VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
T5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT |= {"image_size": 8, "patch_size": 4, "num_labels": data.CLASSES}


def made(name: str, config: str, **values: Any) -> Callable[[], torch.nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**values))


def adapted() -> torch.nn.Module:
    config = transformers.BertConfig(**BERT, num_labels=data.CLASSES)
    adapter = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    return peft.get_peft_model(transformers.BertForSequenceClassification(config), adapter)


class Tagger(torch.nn.Module):
    """No model of transformers; its loss is for compute_loss_func to compute."""

    def __init__(self, classes: int = data.CLASSES) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(data.VOCABULARY, 16)
        self.middle = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, classes)

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        mask = attention_mask.unsqueeze(-1)
        return torch.tanh(self.middle(hidden) + (hidden * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: Any = None) -> Any:
        return {"logits": self.head(self.hidden(input_ids, attention_mask))}


class Mixed(Tagger):
    """A loss of two parts: a sum over tokens divided by the number given, and a mean over the samples that is not."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: Any = None, **kwargs: Any
    ) -> Any:
        hidden = self.hidden(input_ids, attention_mask)
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        num_items = kwargs.get("num_items_in_batch")
        summed = token_sum({"logits": logits}, labels, None)
        own = summed / (labels.ne(data.IGNORED).sum() if num_items is None else num_items)
        return {"loss": own + 0.3 * (hidden[:, 0].square().mean(-1) + 1).mean(), "logits": logits}


def token_sum(outputs: Any, labels: Any, num_items: Any) -> torch.Tensor:
    summed = cross_entropy(outputs["logits"].transpose(1, 2), labels, ignore_index=data.IGNORED, reduction="sum")
    return summed if num_items is None else summed / num_items


def token_mean(outputs: Any, labels: Any, num_items: Any) -> torch.Tensor:
    return cross_entropy(outputs["logits"].transpose(1, 2), labels, ignore_index=data.IGNORED)


def sample_mean(outputs: Any, labels: Any, num_items: Any) -> torch.Tensor:
    return cross_entropy(outputs["logits"][:, 0], labels)


class FirstToken(LabelScores):
    def predictions(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return super().predictions(logits[:, 0], labels)


@dataclass(frozen=True, kw_only=True)
class Case:
    """
    `flags` are of every training of the case. `bound` is the largest relative difference from the whole batch, or three
    times that of reversed batches.
    """

    model: Callable[[], torch.nn.Module]
    samples: data.Make
    metrics: Callable[[], Metrics] | None
    loss: LossFunction | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    bound: float = 1e-5


classes = partial(LabelScores, ["accuracy"], data.CLASSES)
tokens, next_tokens = partial(TokenAccuracy, shift=0), partial(TokenAccuracy, shift=1)
CASES = {
    "BERT, sequence classification": Case(
        model=made("BertForSequenceClassification", "BertConfig", **BERT, num_labels=data.CLASSES),
        samples=data.classed,
        metrics=classes,
    ),
    "BERT with LoRA": Case(model=adapted, samples=data.classed, metrics=classes),
    "BERT compiled": Case(
        model=made("BertForSequenceClassification", "BertConfig", **BERT, num_labels=data.CLASSES),
        samples=data.classed,
        metrics=classes,
        flags={"torch_compile_backend": "eager"},
    ),
    "BERT, several labels": Case(
        model=made(
            "BertForSequenceClassification",
            "BertConfig",
            **BERT,
            num_labels=data.CLASSES,
            problem_type="multi_label_classification",
        ),
        samples=data.several,
        metrics=partial(MultiLabelScores, ["f1", "accuracy"]),
    ),
    "BERT, regression": Case(
        model=made("BertForSequenceClassification", "BertConfig", **BERT, num_labels=1, problem_type="regression"),
        samples=data.measured,
        metrics=partial(RegressionScores, ["mse"]),
    ),
    "BERT, token classification": Case(
        model=made("BertForTokenClassification", "BertConfig", **BERT, num_labels=data.CLASSES),
        samples=data.tagged,
        metrics=tokens,
    ),
    "BERT, question answering": Case(
        model=made("BertForQuestionAnswering", "BertConfig", **BERT), samples=data.asked, metrics=None
    ),
    "BERT, masked-lm": Case(model=made("BertForMaskedLM", "BertConfig", **BERT), samples=data.masked, metrics=tokens),
    "GPT-2, causal-lm": Case(
        model=made("GPT2LMHeadModel", "GPT2Config", **GPT2), samples=data.text, metrics=next_tokens
    ),
    "GPT-2, labels smoothed": Case(
        model=made("GPT2LMHeadModel", "GPT2Config", **GPT2),
        samples=data.text,
        metrics=next_tokens,
        flags={"label_smoothing_factor": 0.1},
    ),
    "Llama, causal-lm": Case(
        model=made("LlamaForCausalLM", "LlamaConfig", **LLAMA), samples=data.text, metrics=next_tokens
    ),
    "T5, seq2seq": Case(model=made("T5ForConditionalGeneration", "T5Config", **T5), samples=data.pair, metrics=tokens),
    "ViT, image classification": Case(
        model=made("ViTForImageClassification", "ViTConfig", **VIT), samples=data.image, metrics=classes
    ),
    "own loss, divided by num_items": Case(model=Tagger, samples=data.tagged, metrics=tokens, loss=token_sum),
    "own loss, a mean over tokens": Case(model=Tagger, samples=data.tagged, metrics=tokens, loss=token_mean),
    "own loss, a mean over samples": Case(
        model=Tagger,
        samples=data.classed,
        metrics=partial(FirstToken, ["accuracy"], data.CLASSES),
        loss=sample_mean,
    ),
    "own model, a sum / num_items + a mean": Case(model=Mixed, samples=data.tagged, metrics=tokens),
    "Mixtral with its router loss": Case(
        model=made("MixtralForCausalLM", "MixtralConfig", **MIXTRAL),
        samples=data.text,
        metrics=None,
        bound=5e-3,  # a product of means over a batch: no weight makes it of the parts' losses
    ),
}


def build(config: TaskConfig) -> Task:
    """The case, the number of training samples, and whether each batch is reversed, from `task_args`."""
    options = dict(config.task_args or {})
    case = CASES[options["case"]]
    return Task(
        model=case.model(),
        train_dataset=data.samples(case.samples, options["size"], seed=1),
        eval_dataset=data.samples(case.samples, EVALUATED, seed=2),
        data_collator=data.collate_reversed if options.get("reversed") else data.collate,
        compute_loss_func=case.loss,
        metrics=case.metrics,
    )
