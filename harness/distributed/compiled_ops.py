"""DeepSpeed's op for CPU processes, compiled at the first start: what a process killed meanwhile leaves of it."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

OP = "deepspeed_shm_comm"
SECONDS_OF_A_LOCK = 60.0  # that nobody here compiles under: another machine may share the folder


def remove_stale_lock() -> None:
    """
    Local, on one rank of a machine: remove the lock on the op's folder that a killed process has left.

    torch would wait for it for ever (torch.utils.file_baton), in this start and in all later ones.
    """
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(OP, verbose=False))
    lock = folder / "lock"
    while lock.exists() and not _is_compiled_here(folder):
        if time.time() - lock.stat().st_mtime > SECONDS_OF_A_LOCK:
            lock.unlink(missing_ok=True)
            logger.warning("Removed %s: the process that was compiling there is gone.", lock)
            return
        time.sleep(0.5)


def _is_compiled_here(folder: Path) -> bool:
    """Whether a compiler works in that folder."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder:
                return True
        except (psutil.Error, OSError):  # it has ended, or is somebody else's
            continue
    return False
