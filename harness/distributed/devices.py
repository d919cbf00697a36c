"""The accelerators of this machine: how its ranks share them, and what must be right before the first is used."""

from __future__ import annotations

import os

import psutil
import torch
from accelerate import Accelerator

from harness.distributed.flags import CUBLAS_VARIABLE
from harness.distributed.launch import find_launch, where
from harness.errors import ConfigError

# What hides accelerators from a process: NVIDIA's variable, AMD's two, Intel's.
VISIBILITY = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
DETERMINISTIC_CUBLAS = (":4096:8", ":16:8")  # the two values that torch accepts


def check_shared_devices(backend: str | None) -> None:
    """
    Refuse more processes than accelerators on this machine, before the process group is made; raises ConfigError.

    Accelerate gives local rank i the device i modulo their number, and NCCL fails at the first collective of two ranks
    on one device. Gloo does not, so that several ranks can be tried on one: `backend` is what --ddp_backend says.
    """
    ranks, devices = local_ranks(), torch.accelerator.device_count()
    if ranks <= devices or backend == "gloo" or _sees_own_devices():
        return
    raise ConfigError(
        f"The launcher started {ranks} processes on this machine, and torch sees {_counted(devices)}: two processes "
        f"can't share one with NCCL (Duplicate GPU). Start one process a device: change {where('num_processes')}; or "
        "give --ddp_backend gloo, which lets them share it and is slow, or --use_cpu."
    )


def describe_idle(accelerator: Accelerator) -> str | None:
    """Return a warning about accelerators of this machine that no process uses; None if there are none."""
    if accelerator.device.type in ("cpu", "mps"):
        return None
    devices, ranks = torch.accelerator.device_count(), local_ranks()
    if devices <= ranks:
        return None
    idle = f"{devices - ranks} of {_counted(devices)} are idle"
    if accelerator.num_processes == 1:
        return f"{idle}; to use them: accelerate launch --multi_gpu ..."
    on_all_machines = devices * accelerator.num_processes // ranks
    return (
        f"{idle}: this machine has {ranks} processes. To use them make it {on_all_machines}: change "
        f"{where('num_processes')}."
    )


def check_cublas() -> None:
    """
    Refuse --full_determinism in a process that may have used cuBLAS already; raises ConfigError.

    cuBLAS reads its variable once, when it is first used, and torch only looks whether the variable is set: set later
    it makes nothing deterministic. Call it before this run uses CUDA.
    """
    if torch.version.cuda is None or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    if os.environ.get(CUBLAS_VARIABLE) not in DETERMINISTIC_CUBLAS:
        raise ConfigError(
            f"--full_determinism needs {CUBLAS_VARIABLE} before CUDA is used, and this process has used it already: "
            f"set {CUBLAS_VARIABLE}={DETERMINISTIC_CUBLAS[0]} before Python starts, or train in a process of its own."
        )


def local_ranks() -> int:
    """Return the number of ranks on this machine; if the launcher does not say, as many as this one's number shows."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0")) + 1)


def _counted(devices: int) -> str:
    name = f" ({torch.cuda.get_device_name(0)})" if torch.cuda.is_available() else ""
    return f"{devices} accelerator{'s' if devices > 1 else ''}{name}"


def _sees_own_devices() -> bool:
    """
    Whether this rank was shown other accelerators than its launcher, as SLURM does with --gpus-per-task.

    The launcher is the nearest process above that has no rank itself; accelerate's gives all ranks its --gpu_ids. True
    also where there is none to be read: then it is not known, and NCCL has the last word.
    """
    launch = find_launch()
    if launch is not None and launch.gpu_ids is not None and launch.gpu_ids == os.environ.get(VISIBILITY[0]):
        return False
    try:
        for process in psutil.Process().parents():
            variables = process.environ()
            if "LOCAL_RANK" not in variables:
                return any(variables.get(name) != os.environ.get(name) for name in VISIBILITY)
    except psutil.Error:  # of another user, as SLURM's daemon
        pass
    return True
