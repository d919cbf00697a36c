"""How fast it is: what is counted, by which clock, and that a resumed run says it in the same rows."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from harness.errors import ConfigError
from harness.flags import parse
from harness.model.flops import Flops
from harness.tracking.rows.events import MEASURED
from harness.training.flags import ThroughputConfig
from harness.training.throughput import Throughput, as_text, documents_in, peak_flops, precision_of
from tests.support.launching import DDP, launcher, run
from tests.support.parity import TASK, TIMING, TRAINING, as_flags, run_harness

SPEED = "train/throughput"
OF_TEXT = {
    f"{SPEED}/samples_per_second",
    f"{SPEED}/samples_per_second_per_device",
    f"{SPEED}/tokens_per_second",
    f"{SPEED}/tokens_per_second_per_device",
    f"{SPEED}/data_wait_share",
}
OF_LABELLED = OF_TEXT | {f"{SPEED}/useful_tokens_per_second", f"{SPEED}/useful_tokens_per_second_per_device"}
BATCH = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": torch.tensor([[1] * 8, [1] * 4 + [0] * 4])}
PER_TOKEN = 600


def gpt() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1, n_positions=8))


def vit() -> ViTForImageClassification:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4))


def throughput(model: torch.nn.Module | None = None, **flags: Any) -> Throughput:
    return Throughput(model or gpt(), ThroughputConfig(**flags), Accelerator(cpu=True), flops_per_token=PER_TOKEN)


def reported(found: Throughput, *, seconds: float) -> dict[str, float]:
    """The report of this rank alone, of a window that began so long ago."""
    found._began_at = time.perf_counter() - seconds
    return found.report([found.values()])


def test_samples_and_tokens_are_those_of_the_batches_padding_included() -> None:
    found = throughput()
    for _ in range(5):
        found.add(BATCH)
    rates = reported(found, seconds=100.0)
    assert rates.keys() == OF_TEXT, "no peak of a CPU is known, and no memory of its own"
    assert rates[f"{SPEED}/samples_per_second"] == pytest.approx(0.1, rel=0.01)
    assert rates[f"{SPEED}/tokens_per_second"] == pytest.approx(0.8, rel=0.01)
    found.add(BATCH)
    again = reported(found, seconds=100.0)[f"{SPEED}/samples_per_second"]
    assert again == pytest.approx(0.02, rel=0.01), "the window began with the last report"


def test_the_work_of_all_ranks_is_added_up_and_the_longest_wait_is_shown() -> None:
    found = throughput()
    found.num_devices = 2
    found._began_at = time.perf_counter() - 100.0
    rates = found.report(
        [
            {"samples": 500, "tokens": 5000, "wait_seconds": 20.0, "peak_gib": 0.0},
            {"samples": 1000, "tokens": 15000, "wait_seconds": 50.0, "peak_gib": 0.0},
        ]
    )
    assert rates[f"{SPEED}/samples_per_second"] == pytest.approx(15, rel=0.01)
    assert rates[f"{SPEED}/samples_per_second_per_device"] == pytest.approx(7.5, rel=0.01)
    assert rates[f"{SPEED}/tokens_per_second"] == pytest.approx(200, rel=0.01)
    assert rates[f"{SPEED}/tokens_per_second_per_device"] == pytest.approx(100, rel=0.01)
    assert rates[f"{SPEED}/data_wait_share"] == pytest.approx(0.5, rel=0.01)


def test_pixels_are_no_tokens_and_have_no_mfu() -> None:
    found = throughput(vit(), peak_flops=1e12)
    found.add({"labels": torch.zeros(3), "pixel_values": torch.zeros(3, 3, 8, 8)})
    rates = reported(found, seconds=100.0)
    names = ("samples_per_second", "samples_per_second_per_device", "data_wait_share")
    assert rates.keys() == {f"{SPEED}/{name}" for name in names}
    assert rates[f"{SPEED}/samples_per_second"] == pytest.approx(0.03, rel=0.01)


def counts(model: torch.nn.Module | None = None, *, labelled: bool = True, **flags: Any) -> Throughput:
    """Of a model whose operations are known, and labels of tokens."""
    return Throughput(
        model or gpt(),
        ThroughputConfig(**flags),
        Accelerator(cpu=True),
        flops_per_token=PER_TOKEN,
        flops=Flops(per_token=700, per_pair=10),
        has_targets=lambda: labelled,
    )


def test_mfu_is_of_the_peak_that_is_given_with_attention_and_without_padding() -> None:
    found = counts(peak_flops=1e9, labelled=False)
    found.add(BATCH)  # documents of 8 and 4 tokens
    rates = reported(found, seconds=100.0)
    assert rates[f"{SPEED}/mfu"] == pytest.approx((12 * 700 + (8**2 + 4**2) * 10) / 100 / 1e9, rel=0.01)
    assert rates[f"{SPEED}/mfu_6n"] == pytest.approx(16 * PER_TOKEN / 100 / 1e9, rel=0.01)
    assert rates.keys() == OF_TEXT | {f"{SPEED}/mfu", f"{SPEED}/mfu_6n"}


def test_where_a_models_operations_are_not_known_there_is_the_common_estimate_alone() -> None:
    found = throughput(peak_flops=1e9)
    found.add(BATCH)
    assert reported(found, seconds=100.0).keys() == OF_TEXT | {f"{SPEED}/mfu_6n"}


@pytest.mark.parametrize(
    ("batch", "documents"),
    [
        (BATCH, [8, 4]),
        ({"input_ids": torch.ones(2, 8)}, [8, 8]),
        ({"input_ids": torch.ones(1, 8), "attention_mask": torch.zeros(1, 1, 8, 8)}, [8]),  # a mask of its own
        ({"input_ids": torch.ones(1, 8), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])}, [3, 2, 3]),
        ({"input_ids": torch.ones(2, 3), "position_ids": torch.tensor([[0, 1, 2], [0, 0, 0]])}, [3]),  # padding
        ({**BATCH, "position_ids": torch.arange(8).expand(2, 8)}, [8, 4]),  # the mask tells
    ],
    ids=["mask", "no mask", "whole", "packed", "packed, two rows", "mask and positions"],
)
def test_documents_are_told_by_the_mask_or_by_where_positions_begin_anew(
    batch: dict[str, torch.Tensor], documents: list[int]
) -> None:
    found = documents_in(batch["input_ids"], batch)
    assert found.tolist() == [sum(documents), sum(length**2 for length in documents)]


def test_tokens_whose_labels_count_are_shown_beside_all() -> None:
    found = counts()
    for _ in range(5):
        found.add(BATCH, targets=torch.tensor(10))
    rates = reported(found, seconds=100.0)
    assert rates[f"{SPEED}/useful_tokens_per_second"] == pytest.approx(0.5, rel=0.01)
    assert rates[f"{SPEED}/tokens_per_second"] == pytest.approx(0.8, rel=0.01)
    found.add(BATCH, targets=torch.tensor(10))
    assert reported(found, seconds=100.0)[f"{SPEED}/useful_tokens_per_second"] == pytest.approx(0.1, rel=0.01)


def test_a_window_without_a_step_has_the_same_names() -> None:
    found = counts(peak_flops=1e12)
    found.add(BATCH, targets=torch.tensor(10))
    worked, empty = reported(found, seconds=1.0), reported(found, seconds=1.0)
    assert worked.keys() == empty.keys() == OF_LABELLED | {f"{SPEED}/mfu", f"{SPEED}/mfu_6n"}
    assert all(math.isnan(value) for value in empty.values())
    assert as_text(empty) is None


def slow(seconds: float, count: int) -> Iterator[int]:
    for number in range(count):
        time.sleep(seconds)
        yield number


def test_waiting_for_data_is_told_from_working() -> None:
    found = throughput()
    for _ in found.drawn(slow(0.03, 4)):
        found.add(BATCH)
        time.sleep(0.01)
    share = found.report([found.values()])[f"{SPEED}/data_wait_share"]
    assert 0.5 < share < 0.95, "three quarters"


def test_the_windows_that_are_drawn_are_the_same() -> None:
    found = throughput()
    assert list(found.drawn(iter([1, 2, 3]))) == [1, 2, 3]
    assert list(found.drawn(iter([]))) == []


def test_a_pause_does_not_count() -> None:
    found = throughput()
    found.add(BATCH)
    with found.paused():
        time.sleep(0.5)
    assert found.report([found.values()])[f"{SPEED}/samples_per_second"] > 2 / 0.25


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "bf16", 312e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A10G", "bf16", 70e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-PCIE-32GB", "fp16", 112e12),
        ("Tesla T4", "fp16", 65e12),
        ("NVIDIA GeForce RTX 3090", "bf16", 71e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165e12),
        ("AMD Instinct MI250X", "bf16", 191.5e12),
        ("AMD Instinct MI300X", "bf16", 1307e12),
        # They have no such cores for it, or others than their cousins, or nobody knows.
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla T4", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA H100 80GB HBM3", "fp8", None),
        ("NVIDIA H20", "bf16", None),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("cpu", "bf16", None),
    ],
)
def test_the_peak_of_a_card_is_known_by_its_whole_name(name: str, precision: str, peak: float | None) -> None:
    assert peak_flops(name, precision) == peak


def test_the_precision_is_that_of_the_products() -> None:
    assert precision_of(gpt(), "fp16") == "fp16"
    assert precision_of(gpt().to(torch.bfloat16), "no") == "bf16"
    assert precision_of(gpt(), "no") == "fp32"


@pytest.mark.parametrize("value", ["0", "-1", "312", "nan", "inf"])
def test_a_peak_that_no_device_has_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=rf"--peak_flops={value}: give FLOP/s of one device"):
        parse([f"--peak_flops={value}"])
    assert parse(["--peak_flops=312e12"]).throughput.peak_flops == 312e12


@pytest.mark.parametrize(
    ("samples", "tokens", "text"),
    [
        (122.34, 15659.0, "122.3 samples/s, 15.7k tokens/s"),
        (3.0, 96.0, "3.0 samples/s, 96 tokens/s"),
        (900.0, 1.234e6, "900.0 samples/s, 1.23M tokens/s"),
        (5.0, None, "5.0 samples/s"),
    ],
)
def test_a_line_shows_it_in_brief(samples: float, tokens: float | None, text: str) -> None:
    rates = {f"{SPEED}/samples_per_second": samples}
    assert as_text(rates | ({} if tokens is None else {f"{SPEED}/tokens_per_second": tokens})) == text


def test_what_is_measured_is_compared_by_nobody() -> None:
    for name in {*OF_LABELLED, f"{SPEED}/mfu", f"{SPEED}/mfu_6n", "train/memory/peak_gib"}:
        assert name.startswith(MEASURED)
        assert TIMING.search(name)


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


TRACKED = {**TRAINING, "report_to": "wandb", "wandb_mode": "offline"}


def test_a_run_tells_it_beside_its_history_without_evaluations_and_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1}
    saves = {"save_strategy": "steps", "save_steps": 2, "async_save": "false", "max_steps": 4, "logging_steps": 2}
    run_harness(tmp_path / "run", {**TRACKED, **evaluates, **saves, "peak_flops": 1e12})
    trained = [row for row in journal(tmp_path / "run") if "train/loss" in row]
    of_row = OF_LABELLED | {f"{SPEED}/mfu", f"{SPEED}/mfu_6n"}
    assert [{name for name in row if name.startswith(MEASURED)} for row in trained] == [of_row] * 2
    for row in trained:
        assert 0 < row[f"{SPEED}/useful_tokens_per_second"] < row[f"{SPEED}/tokens_per_second"]
    seconds = sum(2 * 8 / row[f"{SPEED}/samples_per_second"] for row in trained)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    elsewhere = sum(entry.get("eval_runtime", 0.0) for entry in history)
    assert seconds < history[-1]["train_runtime"] - elsewhere
    assert not [name for entry in history for name in entry if "/" in name]
    assert " tokens/s  ETA " in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_has_the_same_names_in_each_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # 15 steps an epoch: checkpoint-15 stands before the report of its epoch, checkpoint-20 in the middle of a window.
    saves = {"save_strategy": "steps", "save_steps": 5, "logging_strategy": "epoch", "peak_flops": 1e12}
    run_harness(tmp_path / "run", {**TRACKED, **saves})
    whole = journal(tmp_path / "run")
    assert len(whole) == 3
    for step in (15, 20):
        # The disk has what the checkpoint has: the rows behind it are made anew.
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "run" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resume = {"resume_from_checkpoint": folder / f"checkpoint-{step}", "wandb_resume": "allow"}
        run_harness(folder, {**TRACKED, **saves, **resume})
        again = journal(folder)
        assert [row.keys() for row in again] == [row.keys() for row in whole]
        if step == 15:
            assert math.isnan(again[0][f"{SPEED}/mfu"]), "no step of this attempt was in that window"
        assert again[1][f"{SPEED}/mfu"] > 0
    # The disk has all rows: they are made again and compared. That another machine knows no peak makes no other row.
    shutil.rmtree(tmp_path / "run" / "checkpoint-30")
    logger = logging.getLogger("harness.tracking.rows.history")
    logger.addHandler(caplog.handler)
    try:
        del saves["peak_flops"]
        run_harness(tmp_path / "run", {**TRACKED, **saves, "resume_from_checkpoint": "true"})
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.name == logger.name] == []
    assert journal(tmp_path / "run") == whole


@pytest.mark.slow
def test_two_processes_are_reported_together(tmp_path: Path) -> None:
    short = {**TRACKED, "max_steps": 4, "logging_steps": 2, "task": TASK, "output_dir": tmp_path / "run"}
    done = run([*launcher(DDP), "-m", "harness.train", *as_flags(short), "--expect_num_processes", "2"], cwd=tmp_path)
    assert done.code == 0, done.err
    trained = [row for row in journal(tmp_path / "run") if "train/loss" in row]
    assert len(trained) == 2
    for row in trained:
        assert {name for name in row if name.startswith(MEASURED)} == OF_LABELLED
        for what in ("samples", "tokens", "useful_tokens"):
            together, of_one = (row[f"{SPEED}/{what}_per_second{end}"] for end in ("", "_per_device"))
            assert together == pytest.approx(2 * of_one)
        # Two ranks of 8 sequences of 6 to 32 tokens.
        assert 6 < row[f"{SPEED}/tokens_per_second"] / row[f"{SPEED}/samples_per_second"] <= 32
        assert 0 < row[f"{SPEED}/data_wait_share"] < 1
