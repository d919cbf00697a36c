"""The quickstart in each precision and compiled: it learns, says so in its files, and what it saves is loaded."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

from harness.train import main
from tests.gpu.conftest import NeedsCard
from tests.support.launching import flags
from tests.support.parity import reset
from tests.support.tasks.card_tasks import PRODUCT

Figures = Any  # pytest's record_property
# One shape for all batches of an evaluation, so that it is compiled once.
EVALUATION = {"max_eval_samples": 32, "per_device_eval_batch_size": 8, "report_to": "none"}
SHORT = {"max_steps": 20, "logging_steps": 5, "eval_steps": 10, "save_steps": 10, "warmup_steps": 4, **EVALUATION}
SIZES = {
    "cpu": {
        **SHORT,
        "block_size": 32,
        "config_overrides": "n_positions=32,n_embd=64,n_layer=1,n_head=2,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0",
        "learning_rate": 1e-2,
    },
    "cuda": {**SHORT, "max_steps": 100, "logging_steps": 10, "eval_steps": 50, "save_steps": 50},
}
MEASURING, EXACT = "--task=tests.support.tasks.card_tasks:measuring", 1e-5  # TF32's error is above, fp32's below
CLOSE = 3e-2  # relative, for other precisions and compiled sums
GRAPHS = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"  # dynamo's own


def train(folder: Path, device: str, *extra: str, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The quickstart in this process, its files checked; returns the state at its end."""
    reset()
    sizes = SIZES[device] | (sizes or {})
    given = [f"--{name}={value}" for name, value in sizes.items()]
    assert main(["--config=quickstart", f"--output_dir={folder}", f"--use_cpu={device == 'cpu'}", *given, *extra]) == 0
    state: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    check_state(folder, state)
    check_checkpoint(folder, state)
    return state


def check_state(folder: Path, state: dict[str, Any]) -> None:
    """The loss falls, and each report and evaluation is there."""
    steps = state["max_steps"]
    assert TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step == steps
    history = state["log_history"]
    reports = [entry for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    for entries, every in ((reports, state["logging_steps"]), (evaluations, state["eval_steps"])):
        assert [entry["step"] for entry in entries] == list(range(every, steps + 1, every))
    for entry in reports:
        assert entry.keys() == {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    for entry in history:
        assert all(math.isfinite(value) for value in entry.values()), entry
    assert {"train_loss", "train_runtime", "total_flos"} <= history[-1].keys()
    assert reports[-1]["loss"] < 0.95 * reports[0]["loss"]
    losses = [entry["eval_loss"] for entry in evaluations]
    assert losses == sorted(losses, reverse=True)
    assert state["best_metric"] == losses[-1]


def check_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """The last checkpoint and the folder load with from_pretrained, in fp32, and hold the same weights."""
    last = folder / f"checkpoint-{state['max_steps']}"
    models = []
    for place in (last, folder):
        model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        models.append(model)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other), name
    tokens = AutoTokenizer.from_pretrained(last)("The import statement", return_tensors="pt").input_ids
    assert models[0](input_ids=tokens, labels=tokens).loss.isfinite()


def evaluated(folder: Path, device: str) -> float:
    """The loss of a trained folder in a run of its own, in fp32."""
    reset()
    out = folder.with_name(f"{folder.name}-evaluated")
    asked = [
        "--task=harness.tasks.quickstart:build",
        f"--model_name_or_path={folder}",
        f"--block_size={SIZES[device].get('block_size', 128)}",
    ]
    sizes = [f"--{name}={value}" for name, value in EVALUATION.items()]
    assert main([*asked, *sizes, "--do_eval", f"--output_dir={out}", f"--use_cpu={device == 'cpu'}"]) == 0
    found: float = json.loads((out / "all_results.json").read_text(encoding="utf-8"))["eval_loss"]
    return found


@pytest.fixture(scope="module")
def plain(device: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state of a run in fp32, neither compiled nor with TF32."""
    return train(tmp_path_factory.mktemp("plain") / "out", device)


def test_it_learns_in_bf16(device: str, plain: dict[str, Any], tmp_path: Path, record_property: Figures) -> None:
    state = train(tmp_path / "out", device, "--bf16")
    record_property("eval loss", round(state["best_metric"], 4))
    record_property("in fp32", round(plain["best_metric"], 4))
    assert state["best_metric"] != plain["best_metric"]
    assert state["best_metric"] == pytest.approx(plain["best_metric"], rel=CLOSE)
    assert evaluated(tmp_path / "out", device) == pytest.approx(state["best_metric"], rel=CLOSE)


@pytest.mark.filterwarnings(GRAPHS)
def test_it_learns_compiled_in_bf16(
    device: str, plain: dict[str, Any], tmp_path: Path, record_property: Figures
) -> None:
    # inductor takes a minute on a CPU
    compiler = "--torch_compile" if device == "cuda" else "--torch_compile_backend=aot_eager"
    state = train(tmp_path / "out", device, compiler, "--bf16")
    record_property("eval loss", round(state["best_metric"], 4))
    assert state["best_metric"] == pytest.approx(plain["best_metric"], rel=CLOSE)


def test_it_learns_compiled_which_turns_tf32_on(
    device: str,
    needs_card: NeedsCard,
    plain: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Figures,
) -> None:
    needs_card("TF32")
    state = train(tmp_path / "out", device, MEASURING, "--torch_compile")
    record_property("eval loss", round(state["best_metric"], 4))
    assert state["best_metric"] == pytest.approx(plain["best_metric"], rel=CLOSE)
    assert error_of_product(capsys.readouterr().out) > EXACT


@pytest.mark.filterwarnings(GRAPHS)
def test_it_learns_compiled_to_cuda_graphs_with_accumulation(
    device: str, needs_card: NeedsCard, tmp_path: Path, record_property: Figures
) -> None:
    asked = ("--bf16", "--gradient_accumulation_steps=2")
    expected = train(tmp_path / "expected", device, *asked)["best_metric"]
    needs_card("a CUDA graph")
    found = train(tmp_path / "out", device, *asked, "--torch_compile_mode=reduce-overhead")["best_metric"]
    record_property("eval loss", round(found, 4))
    assert found == pytest.approx(expected, rel=CLOSE)


def test_it_learns_in_fp32_as_the_recipe_says(device: str, tmp_path: Path, record_property: Figures) -> None:
    recipe = {"max_steps": 1000, "logging_steps": 50, "eval_steps": 250, "save_steps": 250, "warmup_steps": 30}
    state = train(tmp_path / "out", device, sizes=recipe if device == "cuda" else None)
    record_property("eval loss", round(state["best_metric"], 4))
    record_property("seconds", round(state["log_history"][-1]["train_runtime"], 1))
    # README.md shows 3.19, on all samples of the evaluation
    assert state["best_metric"] < (3.5 if device == "cuda" else 6)
    assert evaluated(tmp_path / "out", device) == pytest.approx(state["best_metric"], rel=1e-4)


@pytest.mark.filterwarnings(GRAPHS)
@pytest.mark.parametrize(
    ("asked", "is_on"),
    [
        ((), False),
        (("--tf32=false",), False),
        (("--tf32=true",), True),
        (("--tf32=false", "--torch_compile_backend=eager"), False),
    ],
    ids=["by default", "off", "on", "off with a graph"],
)
def test_tf32_is_used_where_it_is_asked_for(
    asked: tuple[str, ...],
    is_on: bool,
    device: str,
    needs_card: NeedsCard,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Figures,
) -> None:
    if is_on or len(asked) > 1:  # what would turn it on
        needs_card("TF32")
    train(tmp_path / "out", device, MEASURING, *asked, sizes=SHORT)
    error = error_of_product(capsys.readouterr().out)
    record_property("error of a product", error)
    assert (error > EXACT) == is_on


def error_of_product(shown: str) -> float:
    found = re.search(rf"{PRODUCT} (\S+)", shown)
    assert found is not None, shown
    return float(found[1])


def test_it_learns_in_fp16(
    device: str, needs_card: NeedsCard, plain: dict[str, Any], tmp_path: Path, record_property: Figures
) -> None:
    needs_card("fp16's loss scaler")
    state = train(tmp_path / "out", device, "--fp16")
    record_property("eval loss", round(state["best_metric"], 4))
    assert state["best_metric"] != plain["best_metric"]
    assert state["best_metric"] == pytest.approx(plain["best_metric"], rel=CLOSE)
    assert (tmp_path / "out" / f"checkpoint-{state['max_steps']}" / "scaler.pt").is_file()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_fp16_counts_the_steps_that_it_skips(
    optim: str, device: str, needs_card: NeedsCard, tmp_path: Path, record_property: Figures
) -> None:
    """A fused optimizer skips by itself, and then the schedule goes on, as the Trainer's."""
    out, bad, on_card = tmp_path / "out", 3, device == "cuda"
    arguments = {"task": "tests.support.tasks.card_tasks:overflowing", "task_args": {"at": [bad] * on_card}}
    arguments |= {"max_steps": 8, "logging_steps": 1, "save_steps": 8, "learning_rate": 2e-3, "optim": optim}
    arguments |= {"report_to": "wandb", "wandb_mode": "offline", "fp16": on_card, "use_cpu": not on_card}
    assert main(flags(out, arguments)) == 0
    needs_card("fp16's loss scaler")
    check_skipped(out, bad=bad, steps=8, holds_schedule=optim == "adamw_torch", record=record_property)


def check_skipped(folder: Path, *, bad: int, steps: int, holds_schedule: bool, record: Figures) -> None:
    """Scaler, count and schedule say the same of the skipped steps, one of which is `bad`."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    counts = [value for row in rows for value in [row.get("train/num_skipped_steps")] if value is not None]
    record("steps skipped", counts[-1])
    saved = folder / f"checkpoint-{steps}"
    scaler = torch.load(saved / "scaler.pt", weights_only=True)
    assert counts[-1] == math.log2(65536 / scaler["scale"]) >= 1
    assert counts[bad - 1] == counts[bad - 2] + 1
    schedule = torch.load(saved / "scheduler.pt", weights_only=True)
    assert schedule["last_epoch"] == steps - (counts[-1] if holds_schedule else 0)
    rates = [entry["learning_rate"] for entry in json.loads((saved / "trainer_state.json").read_text())["log_history"]]
    assert (rates[bad] == rates[bad - 1]) == holds_schedule


@pytest.mark.filterwarnings(GRAPHS)
def test_it_learns_in_half_precision_with_kernels_that_are_tuned_at_the_start(
    device: str, needs_card: NeedsCard, tmp_path: Path, record_property: Figures
) -> None:
    expected = train(tmp_path / "expected", device, "--bf16")["best_metric"]
    needs_card("tuning kernels")
    with inductor.patch(max_autotune_gemm_backends="ATEN"):  # with Triton's candidates a start takes minutes
        found = train(tmp_path / "out", device, "--bf16", "--torch_compile_mode=max-autotune")["best_metric"]
    record_property("eval loss", round(found, 4))
    assert found == pytest.approx(expected, rel=CLOSE)
