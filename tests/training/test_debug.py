"""--debug: everything shown, nothing kept, a stop at the first NaN."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.errors import NonFiniteError
from harness.train import main
from harness.training.console import Console
from harness.training.debug import describe_batch, stop_at_non_finite
from tests.support.inputs import save_gpt_tokenizer, text_flags, write_text
from tests.support.parity import history

ROOT = Path(__file__).parents[2]
PARITY = ["--task=tests.support.tasks.parity_task:build", "--use_cpu", "--debug"]


@pytest.fixture(autouse=True)
def environment_of_determinism() -> Iterator[None]:
    """--full_determinism is for a whole process: transformers sets variables and leaves them."""
    before = dict(os.environ)
    yield
    for name in {*os.environ} - {*before}:
        if name.endswith(("_DETERMINISTIC", "_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG")):
            del os.environ[name]


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    flags = text_flags(save_gpt_tokenizer(tmp_path / "tokenizer"), write_text(tmp_path / "train.txt"))
    return [*flags, "--use_cpu", "--debug"]


def test_batch_memory_and_profile_are_shown(
    text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*text, f"--output_dir={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr().out
    for name in ("input_ids", "attention_mask", "labels"):
        assert f"  {name}: (8, 8) int64 on cpu" in shown
    decoded = re.search(r"sample 0, decoded: '(.*)'", shown)
    assert decoded is not None
    assert {"cat", "dog", "sat", "mat", "hill", "old", "red"} & {*decoded[1].replace("\\n", " ").split()}
    assert "its labels, decoded: " in shown
    assert re.search(r"peak memory: \d+ MiB", shown)
    assert "Self CPU" in shown
    assert "aten::" in shown
    assert re.search(r"step 4/4 .*loss ", shown), "every step is reported"


def test_nothing_is_kept_but_the_final_model(text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    out = tmp_path / "out"
    assert main([*text, f"--output_dir={out}"]) == 0
    assert not list(out.glob("checkpoint-*"))
    assert not [path for path in (*out.rglob("*"), *folder.rglob("*")) if "wandb" in path.name]
    assert (out / "model.safetensors").is_file()
    assert not list(folder.iterdir())


def test_the_order_of_the_run_is_that_without_debug(tmp_path: Path) -> None:
    """Looking at a batch must not move what is trained on."""
    flags = ["--logging_steps=1", "--max_steps=4", "--save_strategy=no", "--report_to=none", "--full_determinism"]
    assert main([*PARITY, f"--output_dir={tmp_path / 'debug'}"]) == 0
    assert main([*PARITY[:-1], *flags, f"--output_dir={tmp_path / 'plain'}"]) == 0
    debugged, plain = history(tmp_path / "debug"), history(tmp_path / "plain")
    assert len(debugged) == 5
    assert debugged == plain


def test_a_nan_ends_the_run_and_names_the_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task=tests.support.tasks.odd_tasks:not_a_number", *PARITY[1:]]
    assert main([*flags, f"--output_dir={tmp_path / 'out'}"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("harness train: ") == 1
    assert "NaN first appears in the output of transformer.h.1.mlp.dropout (Poison, shape (4, " in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_without_debug_a_nan_trains_on(tmp_path: Path) -> None:
    flags = ["--task=tests.support.tasks.odd_tasks:not_a_number", "--use_cpu", "--max_steps=3", "--report_to=none"]
    assert main([*flags, f"--output_dir={tmp_path / 'out'}"]) == 0


def test_an_attention_mask_of_minus_infinity_is_no_fault() -> None:
    class Masks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - float("inf")

    class Overflows(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
            return {"deep": [x + float("inf")]}

    masks, overflows = Masks(), Overflows()
    stop_at_non_finite(masks)
    masks(torch.ones(2))
    stop_at_non_finite(overflows)
    with pytest.raises(
        NonFiniteError, match=r"infinity first appears in the output of the model \(Overflows, shape \(2,\)\)"
    ):
        overflows(torch.ones(2))


def test_one_batch_is_learnt_by_heart(tmp_path: Path) -> None:
    flags = [
        "--overfit_batches=1",
        "--max_steps=20",
        "--learning_rate=0.02",
        "--eval_strategy=steps",
        "--eval_steps=20",
    ]
    assert main([*PARITY, *flags, f"--output_dir={tmp_path / 'out'}"]) == 0
    losses = [entry["loss"] for entry in history(tmp_path / "out") if "loss" in entry]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
    evaluations = [entry["eval_loss"] for entry in history(tmp_path / "out") if "eval_loss" in entry]
    assert evaluations[0] < losses[0] / 2, "the same samples are evaluated"


def test_underflow_overflow_is_the_trainers_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task=tests.support.tasks.odd_tasks:plain", "--use_cpu", "--report_to=none", "--save_strategy=no"]
    with pytest.raises(ValueError, match="DebugUnderflowOverflow: inf/nan detected"):
        main([*flags, "--max_steps=3", "--debug=underflow_overflow", f"--output_dir={tmp_path / 'out'}"])
    assert "Detected inf/nan during batch_number" in capsys.readouterr().out


def test_a_batch_of_other_things_is_described_too() -> None:
    batch = {"pixel_values": torch.zeros(2, 3), "names": ["a", "b"], "labels": torch.tensor([1, 0])}
    assert describe_batch(batch, None).splitlines() == [
        "first batch:",
        "  pixel_values: (2, 3) float32 on cpu",
        "  names: list",
        "  labels: (2,) int64 on cpu",
    ]


def test_a_console_that_is_off_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Console(enabled=False, progress=False).line(describe_batch({"x": torch.zeros(1)}, None))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_breakpoint_in_a_collator_stops_at_a_prompt_and_goes_on(tmp_path: Path) -> None:
    main_end, its_end = pty.openpty()
    flags = [
        "--task=tests.support.tasks.odd_tasks:with_breakpoint",
        '--task_args={"stop": true}',
        "--use_cpu",
        "--debug",
    ]
    command = [sys.executable, "-m", "harness.train", *flags, f"--output_dir={tmp_path / 'out'}"]
    process = subprocess.Popen(command, stdin=its_end, stdout=its_end, stderr=its_end, cwd=ROOT, start_new_session=True)
    os.close(its_end)
    shown, sent, deadline = b"", False, time.monotonic() + 100
    try:
        while time.monotonic() < deadline:
            if select.select([main_end], [], [], 0.2)[0]:
                try:
                    shown += os.read(main_end, 1 << 16)
                except OSError:  # the other end is closed
                    break
            if not sent and b"(Pdb) " in shown:
                os.write(main_end, b"p len(samples)\nc\n")
                sent = True
        assert process.wait(timeout=20) == 0, shown.decode(errors="replace")[-2000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(main_end)
    text = shown.decode(errors="replace")
    assert sent, text[-2000:]
    assert re.search(r"p len\(samples\)\s+8\s", text)
    assert "step 4/4" in text
