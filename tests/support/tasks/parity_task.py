"""A task with data made up on the spot: variable lengths, labels partly -100, a GPT-2 with dropout."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from harness.config import Json
from harness.tasks import Task, TaskConfig

VOCABULARY = 256


class VariableLength(Dataset):  # type: ignore[type-arg]
    """Token sequences of 6 to 32; the first part of the labels is masked, as a prompt is."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.samples = []
        for _ in range(size):
            length = int(torch.randint(6, 33, (1,), generator=generator))
            tokens = torch.randint(1, VOCABULARY, (length,), generator=generator)
            labels = tokens.clone()
            labels[: int(torch.randint(0, length // 2, (1,), generator=generator))] = -100
            self.samples.append({"input_ids": tokens, "labels": labels})

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(self.samples[index])


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def padded(name: str, value: int) -> torch.Tensor:
        tensors = [sample[name] for sample in samples]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    tokens = padded("input_ids", 0)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": padded("labels", -100)}


def collate_at_random(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """As masked language modelling does: the collator draws from torch's global generator."""
    batch = collate(samples)
    dropped = torch.rand(batch["input_ids"].shape) < 0.1
    return {**batch, "input_ids": torch.where(dropped, 1, batch["input_ids"])}


class TokenAccuracy:
    names = ("accuracy",)

    def __init__(self) -> None:
        self.correct, self.count = 0, 0

    def predictions(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        predictions, labels = predictions[:, :-1], labels[:, 1:]
        counted = labels != -100
        self.correct += int((predictions == labels)[counted].sum())
        self.count += int(counted.sum())

    def compute(self) -> dict[str, float]:
        return {"accuracy": self.correct / self.count}


def build(config: TaskConfig) -> Task:
    options: dict[str, Any] = {
        "size": 117,
        "llama": False,
        "random_collator": False,
        "dropout": 0.1,
        "stream": False,
        "sets": 1,
        **(config.task_args or {}),
    }
    if options["llama"]:
        model: torch.nn.Module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                attention_dropout=0.1,
                max_position_embeddings=64,
            )
        )
    else:
        shape = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
        shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), options["dropout"])
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    evaluation: Any = VariableLength(21, seed=9)
    if options["sets"] == 2:
        evaluation = {"near": VariableLength(13, seed=9), "far": VariableLength(11, seed=10)}
    train: Any = VariableLength(options["size"], seed=7)
    if options["stream"]:
        rows = [{name: value.tolist() for name, value in sample.items()} for sample in train.samples]
        train = datasets.Dataset.from_list(rows).to_iterable_dataset().with_format("torch")
    return Task(
        model=model,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collate_at_random if options["random_collator"] else collate,
        metrics=TokenAccuracy,
    )


def build_adapted(config: TaskConfig) -> Task:
    """The model with an adapter of peft's on it, as a user of the Trainer puts it there; its config in task_args."""
    from peft import get_peft_config, get_peft_model

    options = dict(config.task_args or {})
    adapter = get_peft_config({"task_type": "CAUSAL_LM", **options.pop("peft")})
    task = build(replace(config, task_args=Json(options)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft turns fan_in_fan_out round by itself, and asks for a deprecated name
        return replace(task, model=get_peft_model(task.model, adapter))
