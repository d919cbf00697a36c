"""Every file of launch_configs/: what it says, that accelerate takes it, and that some test launches it."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import is_deepspeed_available

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
# By tests; that of ddp_fp16.yaml is in tests/gpu/test_sharded.py.
LAUNCHED = {DDP, FP16, FSDP2, FSDP2_OFFLOAD, *PLAIN, *ZERO, *MULTI_NODE}


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
