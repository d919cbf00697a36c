"""`harness.run`: the command as a function, with a model and data of one's own, called again and again."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

import harness
from harness.errors import ConfigError, StoppedError
from harness.flags import parse
from harness.train import main
from tests.support.inputs import save_gpt_tokenizer, text_flags, write_text
from tests.support.launching import DDP, ROOT, launcher, run
from tests.support.parity import TASK, as_flags, assert_equal_weights, history

FAST = {"use_cpu": True, "report_to": "none", "max_steps": 6, "logging_steps": 2, "learning_rate": 1e-2}
FAST |= {"save_strategy": "no"}


class Line(nn.Module):
    """y = 3 x - 1 is to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        y = self.layer(x)
        return {"loss": None if labels is None else nn.functional.mse_loss(y, labels), "logits": y}


POINTS = [{"x": x.view(1), "labels": 3 * x.view(1) - 1} for x in torch.linspace(-1, 1, 64)]


def line() -> Line:
    torch.manual_seed(0)
    return Line()


def trained(folder: Path, flags: Mapping[str, Any] | None = None, **own: Any) -> Any:
    given = {"model": line(), "train_dataset": POINTS, **own}
    return harness.run(as_flags({**FAST, "output_dir": folder, **(flags or {})}), **given)


def test_a_model_and_data_of_ones_own_train(tmp_path: Path) -> None:
    model = line()
    flags = {"max_steps": 60, "learning_rate": 0.1, "lr_scheduler_type": "constant", "do_train": True, "do_eval": True}
    result = trained(tmp_path / "out", flags, model=model, eval_dataset=POINTS[::4])
    assert result.model is model
    assert result.metrics["eval_loss"] < 0.05
    assert result.metrics == json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert result.output_dir == tmp_path / "out"
    assert (result.state.global_step, result.run_id, result.run_url) == (60, None, None)
    assert [row["step"] for row in result.state.log_history if "loss" in row] == list(range(2, 61, 2))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved["layer.weight"], model.layer.weight)
    assert "task: harness:run\n" in (tmp_path / "out" / "harness_config.yaml").read_text()


def test_the_numbers_are_those_of_the_trainer(tmp_path: Path) -> None:
    found = trained(tmp_path / "ours", {"seed": 3})
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        use_cpu=True,
        report_to="none",
        max_steps=6,
        logging_steps=2,
        learning_rate=1e-2,
        seed=3,
        save_strategy="no",
        disable_tqdm=True,
    )
    set_seed(3)
    trainer = Trainer(line(), arguments, train_dataset=POINTS)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in found.state.log_history if "loss" in row] == losses
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_command_line_a_config_and_main_are_one(tmp_path: Path) -> None:
    flags = as_flags({"task": TASK, **FAST})
    by_words = harness.run([*flags, "--output_dir", str(tmp_path / "words")])
    by_config = harness.run(parse([*flags, "--output_dir", str(tmp_path / "config")]))
    assert main([*flags, "--output_dir", str(tmp_path / "main")]) == 0
    for folder in ("config", "main"):
        assert_equal_weights(tmp_path / "words", tmp_path / folder)
        assert history(tmp_path / folder)[:3] == history(tmp_path / "words")[:3]
    assert by_words.metrics["train_loss"] == by_config.metrics["train_loss"]


def test_a_shipped_task_takes_parts_of_ones_own(tmp_path: Path) -> None:
    seen: list[int] = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        seen.append(1)
        return outputs["logits"].square().mean()

    text = text_flags(save_gpt_tokenizer(tmp_path / "tokenizer"), write_text(tmp_path / "train.txt"))
    result = harness.run([*text, *as_flags(FAST), "--output_dir", str(tmp_path / "out")], compute_loss_func=loss)
    assert len(seen) >= 6
    assert result.metrics["train_loss"] < 1


def test_the_best_model_is_the_one_returned(tmp_path: Path) -> None:
    flags = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    flags |= {"load_best_model_at_end": True, "learning_rate": 5, "optim": "sgd"}
    result = trained(tmp_path / "out", flags, eval_dataset=POINTS)
    best = load_file(Path(result.state.best_model_checkpoint) / "model.safetensors")
    assert torch.equal(best["layer.weight"], result.model.layer.weight)


def test_a_resume_goes_on_as_on_the_command_line(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", saving)
    resumes = {**saving, "resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3"}
    again = trained(tmp_path / "again", resumes)
    assert again.state.global_step == 6
    assert torch.equal(whole.model.layer.weight, again.model.layer.weight)
    assert harness.latest_checkpoint(tmp_path / "again") == tmp_path / "again" / "checkpoint-6"
    ended = trained(tmp_path / "again", {**saving, "resume_from_checkpoint": "true"})
    assert torch.equal(ended.model.layer.weight, again.model.layer.weight)


def test_what_goes_wrong_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learning_rat is not a known flag"):
        harness.run(["--learning_rat", "1"])
    with pytest.raises(ConfigError, match="takes no modell; it takes what a Task has: model, train_dataset"):
        harness.run([], modell=line())
    with pytest.raises(ConfigError, match=r"a list of words, not the text"):
        harness.run("--max_steps 3")
    with pytest.raises(ConfigError, match="print_config is for a command line"):
        harness.run(["--print_config"])
    with pytest.raises(ConfigError, match="needs validation data"):
        trained(tmp_path / "out", {"do_eval": True, "do_train": True})
    with pytest.raises(ConfigError, match=r"model and data were arguments of harness\.run in Python"):
        harness.run(["--task", "harness:run", "--use_cpu", "--report_to", "none"])
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="can't be written to"):
        trained(tmp_path / "file" / "out")


def test_a_stop_and_an_interrupt_reach_the_caller(tmp_path: Path) -> None:
    class Signalling(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self, number: int) -> None:
            self.number, self.count = number, 0

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> Any:
            self.count += 1
            if self.count == 20:
                signal.raise_signal(self.number)
            return POINTS[index]

    saving = {"save_strategy": "steps"}
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(StoppedError, match="Preempted at step") as stopped:
        trained(tmp_path / "stopped", saving, train_dataset=Signalling(signal.SIGTERM))
    assert stopped.value.was_preempted
    with pytest.raises(KeyboardInterrupt, match=r"Interrupted at step \d of 6: saved; go on with --resume_from"):
        trained(tmp_path / "interrupted", saving, train_dataset=Signalling(signal.SIGINT))
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    for name in ("stopped", "interrupted"):
        step = int(harness.latest_checkpoint(tmp_path / name).name.partition("-")[2])  # type: ignore[union-attr]
        assert 0 < step < 6
        went_on = trained(tmp_path / name, {**saving, "resume_from_checkpoint": "true"})
        assert went_on.state.global_step == 6


def state_of_process() -> dict[str, Any]:
    loggers = [logging.getLogger(name) for name in ("", "harness", "transformers", "transformers.modeling_utils")]
    return {
        "logging": [(each.level, list(each.handlers), list(each.filters), each.propagate) for each in loggers],
        "bars": transformers_logging.is_progress_bar_enabled(),
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")},
        "signals": [signal.getsignal(each) for each in signal.Signals if each not in (9, 19)],
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "generators": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "matmul": torch.get_float32_matmul_precision(),
        "filters": list(warnings.filters),
        "accelerate": (AcceleratorState._shared_state, PartialState._shared_state, GradientState._shared_state),
        "streams": (sys.stdout, sys.stderr, sys.excepthook, sys.argv),
        "folder": Path.cwd(),
    }


@pytest.mark.parametrize("tracker", ["none", "wandb"])
def test_the_process_is_afterwards_as_it_was(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    import wandb

    if tracker == "wandb":
        wandb.setup()  # its hook for exceptions stays for good
    before = state_of_process()
    first = trained(tmp_path / "first", {"report_to": tracker, "log_level": "debug", "disable_tqdm": True})
    assert state_of_process() == before
    with pytest.raises(ConfigError):
        trained(tmp_path / "second", {"metric_for_best_model": "nonsense", "eval_strategy": "steps"})
    assert state_of_process() == before
    again = trained(tmp_path / "again", {"report_to": tracker})
    assert torch.equal(first.model.layer.weight, again.model.layer.weight)
    assert wandb.run is None
    if tracker == "wandb":
        assert first.run_id != again.run_id
        assert first.run_id == json.loads((tmp_path / "first" / "wandb_run.json").read_text())["run_id"]


def test_determinism_is_put_back_and_precision_unwrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before, model = state_of_process(), line()
    result = trained(tmp_path / "out", {"full_determinism": True, "bf16": True}, model=model)
    assert state_of_process() == before
    assert "forward" not in vars(result.model) or result.model.forward.__func__ is Line.forward
    assert result.model(torch.ones(2, 1))["logits"].dtype == torch.float32


SCRIPT = """
import json, os, sys, time
import torch
from torch import nn
import harness

assert "torch" in sys.modules

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x, labels=None):
        y = self.layer(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}

points = [{"x": x.view(1), "labels": 3 * x.view(1) - 1} for x in torch.linspace(-1, 1, 64)]
for name in ("first", "second"):
    torch.manual_seed(0)
    out = f"{sys.argv[1]}/{name}"
    flags = ["--max_steps", "4", "--report_to", "none", "--save_strategy", "no", "--output_dir", out]
    result = harness.run(flags, model=Line(), train_dataset=points)
    # At once: both ranks write to one pipe, and the launcher starts them with -u.
    os.write(1, f"ended {name} {result.state.global_step} {result.model.layer.weight.item()}\\n".encode())
    if os.environ.get("RANK") == "0":
        time.sleep(2)  # the other rank may begin the next run long before
"""


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("zero2", marks=pytest.mark.deepspeed),
    ],
)
def test_a_script_of_ones_own_is_launched_twice_over(launch: str, tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(SCRIPT, encoding="utf-8")
    ended = run([*launcher(DDP.with_stem(launch), "--num_processes=2"), str(script), str(tmp_path)])
    assert ended.code == 0, ended.err
    found = [found for found in ended.out.splitlines() if found.startswith("ended")]
    assert len(found) == 4
    assert len({text.split()[-1] for text in found}) == 1
    for name in ("first", "second"):
        assert "num_devices: 2" in (tmp_path / name / "README.md").read_text()


NOTEBOOK = """
import harness, torch
from torch import nn

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x, labels=None):
        y = self.layer(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}

points = [{"x": x.view(1), "labels": 3 * x.view(1) - 1} for x in torch.linspace(-1, 1, 64)]

def train(out, *flags):
    flags = ["--max_steps", "4", "--logging_steps", "1", "--use_cpu", "--output_dir", out, *flags]
    return harness.run(flags, model=Line(), train_dataset=points)
"""


@pytest.mark.slow
def test_a_notebook_trains_twice_and_shows_what_goes_wrong(tmp_path: Path) -> None:
    client = pytest.importorskip("jupyter_client")
    manager = client.KernelManager(kernel_name="python3")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    manager.start_kernel(env=environment, cwd=str(tmp_path))
    kernel = manager.client()
    kernel.start_channels()
    try:
        kernel.wait_for_ready(timeout=120)

        def cell(code: str) -> tuple[str, dict[str, Any]]:
            said: list[str] = []

            def note(message: dict[str, Any]) -> None:
                content = message["content"]
                said.append(content.get("text", "") + str(content.get("data", {}).get("text/plain", "")))

            reply = kernel.execute_interactive(code, timeout=200, output_hook=note)
            return "".join(said), reply["content"]

        assert cell(NOTEBOOK)[1]["status"] == "ok"
        shown, reply = cell("result = train('first')")
        assert reply["status"] == "ok"
        assert "step 4/4" in shown
        shown, reply = cell("again = train('second'); print(result.run_id != again.run_id, again.state.global_step)")
        assert "True 4" in shown
        shown, _ = cell("import wandb; print(wandb.run.id == again.run_id); wandb.finish(); print(wandb.run)")
        assert "True" in shown
        assert "None" in shown
        _, reply = cell("train('third', '--learning_rat', '1')")
        assert (reply["status"], reply["ename"]) == ("error", "ConfigError")
        assert "3" in cell("print(1 + 2)")[0]
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)


LIGHT = "import sys, harness; harness.run; print('torch' in sys.modules or 'accelerate' in sys.modules)"


def test_the_package_and_its_function_load_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
