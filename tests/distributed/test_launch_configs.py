"""Every file of launch_configs/: what it says, that accelerate takes it, and that some test launches it."""

from __future__ import annotations

import importlib.util
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import is_deepspeed_available

from harness.distributed.precision import FP8_CAPABILITY
from tests.support.launching import (
    DDP,
    FP16,
    FSDP2,
    FSDP2_OFFLOAD,
    MULTI_NODE,
    PLAIN,
    ROOT,
    SCRIPT,
    ZERO,
    Ended,
    flags,
    free_port,
    launcher,
    run,
)

FILES = sorted((ROOT / "launch_configs").glob("*.yaml"))
WITH_DEEPSPEED = [path for path in MULTI_NODE if "zero" in path.stem]
# By tests; those of fp16.yaml run where there is a GPU.
LAUNCHED = {DDP, FP16, FSDP2, FSDP2_OFFLOAD, *PLAIN, *ZERO, *MULTI_NODE}
HAS_GPU = torch.accelerator.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an accelerator, and this machine has none")
has_fp8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= FP8_CAPABILITY


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_is_explained_launched_by_a_test_and_what_accelerate_reads(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "the first line says what it is"
    head = " ".join(line.lstrip("# ") for line in text.partition("compute_environment")[0].splitlines())
    assert re.search(r"\bTake it (when|on|to)\b", head), "and the next ones when to take it"
    assert path in LAUNCHED, "launch it in a test"
    load_config_from_file(str(path))  # raises for keys that it does not know
    # Of those below these two it just copies what it knows.
    known = set(vars(launch_command_parser().parse_args(["x"])))
    content = yaml.safe_load(text)
    assert set(content.get("deepspeed_config", {})) <= known
    assert {name if name.startswith("fsdp") else f"fsdp_{name}" for name in content.get("fsdp_config", {})} <= known


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_command_line_wins_over_each_file(path: Path) -> None:
    options = ["--num_processes=6", "--num_machines=3", "--machine_rank=2", "--main_process_ip=10.0.0.1"]
    options += ["--main_process_port=1234", "--mixed_precision=bf16"]
    arguments = launch_command_parser().parse_args([f"--config_file={path}", *options, "train.py"])
    found, _, _ = _validate_launch_command(arguments)
    assert (found.num_processes, found.num_machines, found.machine_rank) == (6, 3, 2)
    assert (found.main_process_ip, found.main_process_port, found.mixed_precision) == ("10.0.0.1", 1234, "bf16")


def on_two_machines(config: Path, folder: Path) -> list[Ended]:
    """As on two machines: a launcher each, which meet at an address."""
    arguments: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "save_steps": 2, "expect_num_processes": 2}
    rendezvous = ["--num_machines=2", "--num_processes=2", "--main_process_ip=127.0.0.1"]
    rendezvous.append(f"--main_process_port={free_port()}")  # the last one counts
    commands = [
        [*launcher(config, *rendezvous, f"--machine_rank={rank}"), SCRIPT, *flags(folder, arguments)] for rank in (0, 1)
    ]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, commands))


def check_two_machines(config: Path, folder: Path) -> None:
    first, second = on_two_machines(config, folder)
    assert (first.code, second.code) == (0, 0), first.err[-2000:] + second.err[-2000:]
    assert (first.out.count("step 1/2"), second.out.count("step 1/2")) == (1, 0), "rank zero of all speaks"
    manifest = json.loads((folder / "checkpoint-2" / "harness_state.json").read_text(encoding="utf-8"))
    assert manifest["world_size"] == 2


@pytest.mark.slow
def test_ddp_trains_on_two_machines(tmp_path: Path) -> None:
    check_two_machines(ROOT / "launch_configs" / "multi_node_ddp.yaml", tmp_path / "out")


@pytest.mark.deepspeed
@pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")
@pytest.mark.parametrize("config", WITH_DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_trains_on_two_machines(config: Path, tmp_path: Path) -> None:
    check_two_machines(config, tmp_path / "out")


def test_the_two_tests_above_are_for_all_files_of_several_machines() -> None:
    assert {path.stem for path in MULTI_NODE} == {"multi_node_ddp", *(path.stem for path in WITH_DEEPSPEED)}


@pytest.mark.gpu
@needs_gpu
def test_fp16_trains_and_counts_what_it_skips(tmp_path: Path) -> None:
    arguments = {"max_steps": 4, "logging_steps": 1, "save_steps": 4, "report_to": "wandb", "wandb_mode": "offline"}
    ended = run([*launcher(FP16, "--num_processes=1"), SCRIPT, *flags(tmp_path / "out", arguments)])
    assert ended.code == 0, ended.err[-3000:]
    assert (tmp_path / "out" / "checkpoint-4" / "scaler.pt").is_file()
    assert '"train/num_skipped_steps"' in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")


@pytest.mark.gpu
@pytest.mark.skipif(
    not has_fp8 or importlib.util.find_spec("torchao") is None,
    reason="needs torchao and an Ada or Hopper GPU, and this machine lacks one of them",
)
def test_fp8_trains_and_is_saved_as_an_ordinary_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    options = ["--num_processes=1", "--mixed_precision=fp8"]
    arguments = {"max_steps": 4, "logging_steps": 1, "save_steps": 4}
    ended = run([*launcher(DDP, *options), SCRIPT, *flags(tmp_path / "out", arguments)])
    assert ended.code == 0, ended.err[-3000:]
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
