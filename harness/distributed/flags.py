"""The flags of devices, precision and DDP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from harness.config import arg, at_least, choice, section
from harness.errors import ConfigError

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
# Each is there where a driver is: NVIDIA's, AMD's, that of Windows below Linux.
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def hide_accelerators() -> None:
    """
    Hide the GPUs of this machine from a process that trains on the CPU; call it before torch is loaded.

    Torch's own Adam asks the first GPU at each step whether it captures a graph, and so takes memory of it.
    """
    if any(map(os.path.exists, DRIVERS)):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextmanager
def environment_kept() -> Iterator[None]:
    """
    Put the environment back at the end of the block.

    wandb's own variables belong to its process, which lives on; and cuBLAS has read its variable for good.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in {*before, *os.environ}:
            if name.startswith("WANDB_") or name == CUBLAS_VARIABLE or os.environ.get(name) == before.get(name):
                continue
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


@section("devices")
@dataclass(frozen=True, kw_only=True)
class TopologyConfig:
    """Devices, precision, DDP. How many processes there are belongs to the launch config."""

    use_cpu: bool = arg(False, "Train on the CPU even if there is an accelerator.", on_resume="checked")
    expect_num_processes: int | None = arg(
        help="Refuse to start unless the launcher started so many processes.", on_resume="unrelated"
    )
    bf16: bool = arg(False, "Mixed precision with bfloat16.", on_resume="checked", common=True)
    fp16: bool = arg(False, "Mixed precision with float16 and loss scaling.", on_resume="checked")
    tf32: bool | None = arg(help="TF32 matrix products on Ampere or newer; default: torch's.")
    seed: int = arg(42, "Seed of all random generators.", common=True)
    full_determinism: bool = arg(False, "Deterministic kernels where there are any; slower.")
    torch_compile: bool = arg(False, "Compile the model with torch.compile.")
    torch_compile_backend: str | None = arg(help="Backend of torch.compile; turns it on. Default: inductor.")
    torch_compile_mode: str | None = arg(help=f"Mode of torch.compile; turns it on: {', '.join(COMPILE_MODES)}.")
    ddp_backend: str | None = arg(help="Backend of the process group: nccl, gloo, mpi, ccl, hccl, cncl, mccl.")
    ddp_timeout: int = arg(1800, "Seconds until a collective that hangs raises.", on_resume="free")
    ddp_find_unused_parameters: bool | None = arg(
        help="Default: true unless activations are checkpointed.", on_resume="free"
    )
    ddp_bucket_cap_mb: int | None = arg(help="Size of DDP's gradient buckets in MB.")
    ddp_broadcast_buffers: bool | None = arg(help="Broadcast buffers before each forward.")
    ddp_static_graph: bool | None = arg(help="Tell DDP that the graph never changes.", on_resume="free")

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:  # numpy's limits
            raise ConfigError(f"--seed={self.seed}: use 0 or more, up to {2**32 - 1}.")
        at_least(
            1,
            expect_num_processes=self.expect_num_processes,
            ddp_timeout=self.ddp_timeout,
            ddp_bucket_cap_mb=self.ddp_bucket_cap_mb,
        )
        if self.bf16 and self.fp16:
            raise ConfigError("--bf16 and --fp16 exclude each other; give one of them.")
        if self.torch_compile_mode is not None:
            choice("torch_compile_mode", self.torch_compile_mode, COMPILE_MODES)
        if self.ddp_backend is not None:
            choice("ddp_backend", self.ddp_backend, ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"))

    @property
    def compiles(self) -> bool:
        """Whether to compile: asked for, or a backend or a mode was given."""
        return self.torch_compile or bool(self.torch_compile_backend or self.torch_compile_mode)

    @property
    def mixed_precision(self) -> str | None:
        """What the flags ask for; None leaves it to the launch config."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else None
