"""Memory of the device and of the host: give back what is free, and tell how much there is."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import clear_device_cache

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESETS_PEAK = "5"  # written to RESET; see proc(5)
KIB = 1024
# Where a control group says how much memory its processes may take, and take: of the second version and of the first.
GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory.stat")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.stat"),
    ),
)


def release() -> None:
    """Give memory that nothing refers to back to the device, after an error has let go of what it held."""
    gc.collect()
    clear_device_cache()


def free_on_host() -> int:
    """Return the bytes that this process may still take before the system ends it: the machine's, its group's."""
    return min([int(psutil.virtual_memory().available), *(left for left in map(_left, GROUPS) if left is not None)])


def _left(files: tuple[Path, Path, Path]) -> int | None:
    """Return the bytes that a control group has left, its file cache among them; None without a limit."""
    try:
        limit, used = (int(file.read_text(encoding="ascii")) for file in files[:2])
        lines = files[2].read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # there is none, or it says `max`
        return None
    cached = {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
    return limit - used + cached.get("total_inactive_file", cached.get("inactive_file", 0))


class HostPeak:
    """
    Measures the most memory that this process has held within the block, in bytes above that at its beginning.

    `grown` is None where the system does not say.
    """

    def __init__(self) -> None:
        self.grown: int | None = None
        self._before: int | None = None

    def __enter__(self) -> HostPeak:
        try:
            RESET.write_text(RESETS_PEAK, encoding="ascii")
            self._before = _of_status("VmRSS")
        except (OSError, ValueError):
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.grown = max(_of_status("VmHWM") - self._before, 0)


def _of_status(name: str) -> int:
    """Return a value of /proc/self/status in bytes. Raises OSError or ValueError where there is none."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * KIB
    raise ValueError(f"{STATUS} has no {name}")


def trained_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's gradients."""
    return sum(each.numel() * each.element_size() for each in model.parameters() if each.requires_grad)
