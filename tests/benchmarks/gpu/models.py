"""The models of the benchmarks, with random weights, and batches of random tokens that lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from harness.tasks import Task, TaskConfig

Batch = dict[str, torch.Tensor]
Collate = Callable[[Sequence[Batch]], Batch]
Options = dict[str, Any]
# No dropout, as in pretraining: 124 M parameters; the vocabulary as nanoGPT rounds it up.
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50304, "n_positions": 1024}
# 1.1 B parameters, TinyLlama's shape.
LLAMA = {
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
SMALL_GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 256, "n_positions": 64}
SMALL_LLAMA = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}
NUM_ROWS = 256


@dataclass(frozen=True)
class Work:
    """A model, made on the device since a billion weights take long to draw elsewhere, and the batches it trains on."""

    config: PretrainedConfig
    _: KW_ONLY
    batch: int
    length: int
    device: str
    bf16: bool = True
    compiles: bool = False
    recomputes: bool = False
    num_steps: int = 1000

    def model(self) -> PreTrainedModel:
        with torch.device(self.device):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa")
        # GPT2LMHeadModel does not say it and warns in its forward, which breaks the graph and compiles it four times.
        made.loss_type = "ForCausalLM"
        return made

    @property
    def dataset(self) -> Tokens:
        return Tokens(self.config.vocab_size, self.length, num_samples=self.batch * self.num_steps)

    def halved(self) -> Work:
        return replace(self, batch=self.batch // 2)

    def flops_per_token(self, model: PreTrainedModel) -> float:
        """6N + 12LHQT, PaLM's count: N without embeddings that no matrix product uses, recomputation not counted."""
        head = model.get_output_embeddings().weight
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} - {id(head)}
        multiplied = sum(p.numel() for p in model.parameters() if id(p) not in looked_up)
        return 6.0 * multiplied + 12.0 * self.config.num_hidden_layers * self.config.hidden_size * self.length


def gpt2(shape: Mapping[str, int]) -> PretrainedConfig:
    return GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)


def llama(shape: Mapping[str, int]) -> PretrainedConfig:
    return LlamaConfig(**shape, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)


class Tokens(Dataset):  # type: ignore[type-arg]
    """Rows of random tokens, the same in each process, as many times over as samples are asked for."""

    def __init__(self, vocab_size: int, length: int, *, num_samples: int) -> None:
        self.num_samples = num_samples
        self.rows = torch.randint(0, vocab_size, (NUM_ROWS, length), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Batch:
        row = self.rows[index % NUM_ROWS]
        return {"input_ids": row, "labels": row}


def stacked(samples: Sequence[Batch]) -> Batch:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


_given: list[tuple[Work, Collate]] = []
TASK = f"{__name__}:build"


def build(config: TaskConfig | None = None) -> Task:
    """The task for harness, which finds it by its name."""
    ((work, collate),) = _given
    return Task(model=work.model(), train_dataset=work.dataset, data_collator=collate)


@contextmanager
def offered(work: Work, collate: Collate) -> Iterator[None]:
    """Make `build` build this."""
    _given[:] = [(work, collate)]
    try:
        yield
    finally:
        _given.clear()
