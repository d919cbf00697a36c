"""Devices that are not here: torch's functions are patched to say what a machine with GPUs would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from harness.data.flags import DataConfig
from harness.data.samples import worker_options
from harness.distributed.accelerator import build_accelerator
from harness.distributed.devices import check_cublas, check_shared_devices, describe_idle
from harness.distributed.fsdp2 import FSDP2
from harness.distributed.ranks import close_group
from harness.errors import ConfigError
from harness.flags import parse
from harness.training.stopping import Stop
from tests.support.launching import DDP, ROOT, flags, launcher, run

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with so many GPUs, on which a launcher has started so many processes."""

    def make(*, gpus: int, ranks: int = 1, ranks_in_all: int | None = None) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
        given = {"LOCAL_WORLD_SIZE": ranks, "WORLD_SIZE": ranks_in_all or ranks, "LOCAL_RANK": 0, "RANK": 0}
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))

    return make


def accelerator_on(device: str, *, ranks: int = 1) -> Any:
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = torch.device(device)
    accelerator.state.num_processes = ranks
    return accelerator


@pytest.mark.parametrize("backend", [None, "nccl"])
def test_two_processes_on_one_gpu_are_refused_before_there_is_a_process_group(
    machine: Machine, backend: str | None
) -> None:
    machine(gpus=1, ranks=2)
    says = (
        r"started 2 processes on this machine, and torch sees 1 accelerator \(NVIDIA H100\): .* change `num_processes`"
    )
    with pytest.raises(ConfigError, match=says):
        build_accelerator(
            parse([] if backend is None else [f"--ddp_backend={backend}"]).topology, activation_checkpointing=False
        )
    assert not torch.distributed.is_initialized()


def test_gloo_lets_processes_share_a_gpu(machine: Machine) -> None:
    machine(gpus=1, ranks=2)
    check_shared_devices("gloo")


def test_a_process_a_gpu_is_right(machine: Machine) -> None:
    machine(gpus=8, ranks=8, ranks_in_all=16)
    check_shared_devices(None)


def test_a_rank_above_the_devices_is_seen_where_the_launcher_does_not_say_how_many_there_are(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(gpus=1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    check_shared_devices(None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ConfigError, match="started 4 processes on this machine"):
        check_shared_devices(None)


@pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
def test_ranks_that_were_each_given_a_gpu_are_no_more_than_there_are(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """As SLURM does with --gpus-per-task=1: each rank sees one device, and has a local rank of its own."""
    machine(gpus=1, ranks=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(variable, "1")
    check_shared_devices(None)


SLURM_STEP = """
import os, subprocess, sys
# A launcher that binds each rank to a GPU, and one that does not; a shell of the user's between it and the rank.
own = {"CUDA_VISIBLE_DEVICES": "1"} if sys.argv[1] == "bound" else {}
rank = {**os.environ, **own, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
code = '''
import torch
torch.accelerator.device_count = lambda: 1
from harness.distributed.devices import check_shared_devices
from harness.errors import ConfigError
try:
    check_shared_devices(None)
    print("passed")
except ConfigError:
    print("refused")
'''
subprocess.run(["sh", "-c", 'exec 3>&1; "$@"; exit $?', "-", sys.executable, "-c", code], env=rank, check=True)
"""


@pytest.mark.parametrize(("binding", "says"), [("bound", "passed"), ("unbound", "refused")])
def test_the_launcher_is_found_behind_a_shell(binding: str, says: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", SLURM_STEP, binding]
    ended = subprocess.run(command, env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == says


ONE_GPU = """
import sys
import torch

torch.accelerator.is_available = torch.cuda.is_available = lambda: True
torch.accelerator.device_count = torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda *_: "NVIDIA H100"
from harness.train import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--gpu_ids=0,1"]], ids=["all devices", "chosen devices"])
def test_a_launch_of_two_processes_on_one_gpu_is_refused_once(tmp_path: Path, options: list[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(ONE_GPU, encoding="utf-8")
    ended = run([*launcher(DDP, *options), str(script), *flags(tmp_path / "out", {"max_steps": 1})], forked=False)
    assert ended.code != 0
    assert ended.err.count("harness train: The launcher started 2 processes on this machine, and torch sees 1 ") == 1
    assert f"change `num_processes` in {DDP}, line " in ended.err
    assert not (tmp_path / "out").exists()


def test_idle_gpus_are_named(machine: Machine) -> None:
    accelerator = accelerator_on("cuda", ranks=2)
    machine(gpus=8, ranks=2)
    said = describe_idle(accelerator)
    assert said is not None
    assert said.startswith("6 of 8 accelerators (NVIDIA H100) are idle: this machine has 2 processes. ")
    assert "make it 8: change `num_processes`" in said
    machine(gpus=8, ranks=2, ranks_in_all=4)
    accelerator.state.num_processes = 4
    assert "make it 16: " in str(describe_idle(accelerator))


def test_a_single_process_is_told_how_to_use_the_other_gpus(machine: Machine) -> None:
    accelerator = accelerator_on("cuda")
    machine(gpus=4)
    assert describe_idle(accelerator) == (
        "3 of 4 accelerators (NVIDIA H100) are idle; to use them: accelerate launch --multi_gpu ..."
    )


@pytest.mark.parametrize(("device", "gpus", "ranks"), [("cpu", 8, 2), ("cuda", 8, 8), ("cuda", 1, 8)])
def test_nothing_is_said_where_no_gpu_is_idle(machine: Machine, device: str, gpus: int, ranks: int) -> None:
    accelerator = accelerator_on(device, ranks=ranks)
    machine(gpus=gpus, ranks=ranks)
    assert describe_idle(accelerator) is None


@pytest.mark.parametrize("value", [None, ":0:0"])
def test_full_determinism_is_refused_where_cublas_may_have_been_used(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    check_cublas()  # CUDA is not in use yet: transformers sets the variable in time
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    if value is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    with pytest.raises(ConfigError, match="set CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts"):
        check_cublas()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    check_cublas()


@pytest.fixture
def alone_in_a_group() -> Iterator[Accelerator]:
    """An Accelerator in a process group of one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=77))])
    yield accelerator
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_the_timeout_of_collectives_holds_for_the_groups_of_our_own(
    alone_in_a_group: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    new_group = torch.distributed.new_group

    def noted(*args: Any, **options: Any) -> Any:
        made.append(new_group(*args, **options))
        return made[-1]

    monkeypatch.setattr(torch.distributed, "new_group", noted)
    FSDP2(alone_in_a_group).writers_agreement()
    alone_in_a_group.state.num_processes = 2
    Stop(alone_in_a_group, requested=lambda: False)
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in made]
    assert timeouts == [timedelta(seconds=77)] * 2


@pytest.mark.parametrize("has_nccl", [True, False])
def test_a_rank_that_fails_alone_aborts_nccl_and_waits_for_nobody(
    alone_in_a_group: Accelerator, monkeypatch: pytest.MonkeyPatch, has_nccl: bool
) -> None:
    aborted: list[bool] = []
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_abort_process_group", lambda: aborted.append(True))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda *_: pytest.fail("it would wait"))
    if has_nccl:
        monkeypatch.setattr(torch.distributed, "get_backend_config", lambda *_: "cpu:gloo,cuda:nccl")
    close_group(together=False)
    assert aborted == [True] * has_nccl
    monkeypatch.undo()


def test_closing_together_leaves_no_group(alone_in_a_group: Accelerator) -> None:
    close_group(together=True)
    assert not torch.distributed.is_initialized()
    close_group(together=True)
    close_group(together=False)


# Torch as on a machine with a GPU, of which nobody may make use. Not in this process: libraries keep what they found.
WITH_A_GPU = """
import sys
import torch

def fail(*args, **kwargs):
    raise AssertionError("it opens the GPU")

torch.cuda.is_available = torch.accelerator.is_available = lambda: True
torch.cuda.device_count = torch.accelerator.device_count = lambda: 1
torch.accelerator.current_accelerator = lambda *args, **kwargs: torch.device("cuda")
torch.cuda._lazy_init = torch.cuda.current_device = torch.cuda.get_device_properties = fail
torch.Tensor.pin_memory = fail
from harness.train import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", [["--debug"], ["--dataloader_num_workers=1", "--eval_strategy=steps"]], ids=" ".join)
def test_a_training_on_the_cpu_leaves_the_gpu_alone(tmp_path: Path, mode: list[str]) -> None:
    arguments = {"max_steps": 2, "optim": "sgd", "torch_empty_cache_steps": 1}
    argv = [*flags(tmp_path / "out", arguments), "--use_cpu", *mode]
    ended = run([sys.executable, "-c", WITH_A_GPU, *argv])
    assert ended.code == 0, ended.err[-3000:]


STARTED = """
import os, sys
import harness.distributed.flags, harness.train

def build(config):
    from tests.support.tasks import parity_task
    print("visible:", repr(os.environ.get("CUDA_VISIBLE_DEVICES")))
    return parity_task.build(config)

harness.distributed.flags.DRIVERS = [sys.argv.pop(1)]
sys.exit(harness.train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("driver", "visible"), [("/dev/null", "''"), ("/dev/none", "'0'")])
def test_a_start_on_the_cpu_hides_the_gpus_that_there_are(tmp_path: Path, driver: str, visible: str) -> None:
    given = [flag for flag in flags(tmp_path / "out", {"max_steps": 1}) if not flag.startswith("--task=")]
    argv = [*given, "--use_cpu", "--task=__main__:build"]
    ended = run([sys.executable, "-c", STARTED, driver, *argv], forked=False, CUDA_VISIBLE_DEVICES="0")
    assert ended.code == 0, ended.err[-3000:]
    assert f"visible: {visible}" in ended.out


@pytest.mark.parametrize(("device", "pins"), [("cuda", True), ("xpu", True), ("cpu", False), ("mps", False)])
def test_memory_is_pinned_for_the_device_of_the_training(device: str, pins: bool) -> None:
    given = worker_options(DataConfig(), torch.device(device))
    assert given["pin_memory"] == pins
    assert not worker_options(DataConfig(dataloader_pin_memory=False), torch.device(device))["pin_memory"]
