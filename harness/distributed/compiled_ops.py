"""DeepSpeed's op for CPU processes, compiled at the first start: remove the lock that a killed compilation leaves."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

OP = "deepspeed_shm_comm"
SECONDS_OF_A_LOCK = 60.0  # older, and without a compiler here, it is stale: another machine may share the folder


def remove_stale_lock() -> None:
    """
    Local, on one rank of a machine: remove the lock that a killed process has left on the op's folder.

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
    """Whether a compiler on this machine works in that folder."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder:
                return True
        except (psutil.Error, OSError):  # the process has ended, or belongs to another user
            continue
    return False
