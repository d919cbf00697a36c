"""The columns of throughput against counts and clocks of the test's own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from harness.model.flops import flops_of
from harness.train import main
from harness.training.flags import MetricsConfig, ThroughputConfig
from harness.training.metrics import Work
from harness.training.throughput import Throughput, peak_flops
from tests.gpu.conftest import NeedsCard
from tests.support.inputs import save_gpt_tokenizer, text_flags, write_text
from tests.support.parity import TRAINING, as_flags, reset

SPEED, PEAK_MEMORY = "train/throughput", "train/memory/peak_gib"
PEAK = 1e12
Record = Callable[[str, object], None]


def sizes(device: str) -> dict[str, int]:
    if device == "cuda":
        return {"layers": 12, "width": 768, "words": 50304, "length": 1024, "batch": 8, "steps": 10}
    return {"layers": 2, "width": 64, "words": 256, "length": 64, "batch": 2, "steps": 10}


def throughput(model: torch.nn.Module, device: str, *, peak: float | None = PEAK) -> Throughput:
    reset()
    accelerator = Accelerator(cpu=device == "cpu")
    work = Work(model, MetricsConfig(), accelerator, pad_token_id=None)
    config, per_token = ThroughputConfig(peak_flops=peak), work.flos_per_element
    return Throughput(model, config, accelerator, flops_per_token=per_token, flops=flops_of(model))


def wait_for(device: str) -> None:
    torch.get_device_module(device).synchronize()


def test_mfu_is_the_hand_count(device: str, record_property: Record) -> None:
    """Of GPT-2's blocks, last norm, head and attention, by a clock that waits for the device."""
    size = sizes(device)
    layers, width, length = size["layers"], size["width"], size["length"]
    shape = {"n_layer": layers, "n_embd": width, "n_head": 4, "vocab_size": size["words"], "n_positions": length}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).to(device, torch.bfloat16)
    found = throughput(model, device)
    batch = {"input_ids": torch.ones(size["batch"], length, dtype=torch.int64, device=device)}

    def step() -> None:
        found.add(batch)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        model.zero_grad()

    step()  # the libraries' start
    wait_for(device)
    found.begin()
    began = time.perf_counter()
    for _ in range(size["steps"]):
        step()
    wait_for(device)
    rates = found.report([found.values()])
    seconds = time.perf_counter() - began
    parameters = layers * (12 * width**2 + 13 * width) + 2 * width
    a_second = size["steps"] * size["batch"] * length / seconds
    flops = (6 * (parameters + size["words"] * width) + 12 * layers * width * length) * a_second
    assert rates[f"{SPEED}/mfu"] == pytest.approx(flops / PEAK, rel=0.05)
    assert rates[f"{SPEED}/mfu_6n"] == pytest.approx(6 * parameters * a_second / PEAK, rel=0.05)
    if device == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(), "bf16")
        assert throughput(model, device, peak=None).peak == peak
        record_property("MFU of forward and backward", round(flops / peak, 3) if peak else "of an unknown card")


class Busy:
    """Keeps the device busy for about so many seconds a call, and knows how long it really was."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device = device
        self.matrix = torch.ones(2048, 2048, device=device) if device == "cuda" else torch.ones(256, 256)
        self.count, self.marks = 1, [(self._mark(), self._mark())]
        self()  # the libraries' start
        while self.seconds() < seconds:
            self.count *= 2
            self.marks.clear()
            self()
        self.count = max(1, int(self.count * seconds / self.seconds()))
        self.marks.clear()

    def __call__(self) -> None:
        began = self._mark()
        for _ in range(self.count):
            torch.mm(self.matrix, self.matrix)
        self.marks.append((began, self._mark()))

    def seconds(self) -> float:
        """Of the calls since the count was set."""
        wait_for(self.device)
        if self.device == "cuda":
            return sum(began.elapsed_time(ended) for began, ended in self.marks) / 1000
        return sum(ended - began for began, ended in self.marks)

    def _mark(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def slow(seconds: float, count: int) -> Iterator[int]:
    for number in range(count):
        time.sleep(seconds)
        yield number


def test_the_share_of_a_slow_loader_is_shown_within_20_percent(device: str, record_property: Record) -> None:
    """It is the time in which the device has nothing to do."""
    work = Busy(device, 0.02)
    found = throughput(torch.nn.Linear(1, 1), device)
    wait_for(device)
    found.begin()
    began = time.perf_counter()
    for _ in found.drawn(slow(0.06, 12)):
        found.add({"input": torch.ones(1)})
        work()
    worked = work.seconds()
    share = found.report([found.values()])[f"{SPEED}/data_wait_share"]
    idle = 1 - worked / (time.perf_counter() - began)
    record_property("shown, and the share in which the device was idle", f"{share:.2f}, {idle:.2f}")
    assert 0.3 < idle < 0.9
    assert share == pytest.approx(idle, rel=0.2)


def test_a_device_that_has_work_left_does_not_wait_for_data(device: str, needs_card: NeedsCard) -> None:
    work = Busy(device, 0.06)
    found = throughput(torch.nn.Linear(1, 1), device)
    wait_for(device)
    found.begin()
    work()
    for _ in found.drawn(slow(0.02, 8)):
        found.add({"input": torch.ones(1)})
        work()
    wait_for(device)
    share = found.report([found.values()])[f"{SPEED}/data_wait_share"]
    needs_card("work that runs beside the host")
    assert share < 0.1


def test_the_peak_is_what_the_training_took(device: str, needs_card: NeedsCard) -> None:
    found = throughput(torch.nn.Linear(1, 1), device)
    assert (PEAK_MEMORY in found.report([found.values()])) == (device == "cuda")
    needs_card("a device's memory")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    taken = torch.empty(2**30, dtype=torch.uint8, device=device)
    del taken
    peak = found.report([found.values()])[PEAK_MEMORY]
    assert peak == pytest.approx(1 + before / 2**30, abs=0.01)


def test_a_run_has_the_columns_in_its_rows(device: str, tmp_path: Path) -> None:
    reset()
    flags = text_flags(save_gpt_tokenizer(tmp_path / "gpt2"), write_text(tmp_path / "text.txt"))
    short = {**TRAINING, "max_steps": 4, "logging_steps": 2, "report_to": "wandb", "wandb_mode": "offline"}
    cpu = ["--use_cpu"] if device == "cpu" else []
    assert main([*flags, *as_flags({**short, "peak_flops": PEAK, "output_dir": tmp_path / "run"}), *cpu]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row]
    assert len(rows) == 2
    for row in rows:
        tokens = row[f"{SPEED}/tokens_per_second"]
        assert tokens == pytest.approx(8 * row[f"{SPEED}/samples_per_second"])
        parameters = 12 * 16**2 + 13 * 16 + 2 * 16
        assert row[f"{SPEED}/mfu_6n"] == pytest.approx(tokens * 6 * parameters / PEAK)
        assert row[f"{SPEED}/mfu"] > row[f"{SPEED}/mfu_6n"], "the head and the attention are work, too"
        assert 0 <= row[f"{SPEED}/data_wait_share"] <= 1
        assert (PEAK_MEMORY in row) == (device == "cuda")
    if device == "cuda":
        assert 0 < rows[-1][PEAK_MEMORY] <= torch.cuda.max_memory_allocated() / 2**30
