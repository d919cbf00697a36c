"""Know a process again: by a fingerprint that no clock and no other container with the same numbers makes wrong."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil

PROC = Path("/proc")
BOOT_ID = PROC / "sys" / "kernel" / "random" / "boot_id"


def fingerprint_of(pid: int | None = None) -> str:
    """
    Return the fingerprint of a process, by default this one: where its number is valid, and when it was started.

    That is the boot of the machine, the namespaces of numbers and of the kernel's clock (containers share the boot),
    and the start by the kernel's own clock, which nobody sets. It is "" where that can't be known.
    """
    place = _place()
    _, start = _state_and_start(os.getpid() if pid is None else pid)
    return f"{place} {start}" if place and start else ""


def is_running(pid: int, fingerprint: str | float) -> bool | None:
    """
    Whether the process with this number and fingerprint runs; a zombie does not. None: that can't be seen from here.

    So it is with another machine or container, or one that has been booted since, and with files that older versions
    wrote: their `fingerprint` is the time of creation in seconds since 1970, by a clock that may have been set.
    """
    if isinstance(fingerprint, int | float):
        return _matches(pid, fingerprint) or None
    place, _, start = fingerprint.rpartition(" ")
    if not place or place != _place():
        return None
    state, found = _state_and_start(pid)
    if not found:  # gone; or hidden from us, as where /proc is mounted with hidepid
        return None if _exists(pid) else False
    return found == start and state not in "ZX"


def _place() -> str:
    """Return what makes the numbers of processes and the kernel's times unique; "" if it can't be known."""
    if sys.platform == "darwin":
        return _boot_session()
    try:
        if str((PROC / "self").readlink()) != str(os.getpid()):  # /proc is that of another container
            return ""
        namespaces = [str((PROC / "self" / "ns" / "pid").readlink())]
        with suppress(FileNotFoundError):  # before Linux 5.6
            namespaces.append(str((PROC / "self" / "ns" / "time").readlink()))
        return " ".join([BOOT_ID.read_text(encoding="ascii").strip(), *namespaces])
    except OSError:
        return ""


def _boot_session() -> str:
    """Return macOS's name for what runs since the machine was started."""
    found, size = ctypes.create_string_buffer(64), ctypes.c_size_t(64)
    try:
        failed = ctypes.CDLL(None).sysctlbyname(b"kern.bootsessionuuid", found, ctypes.byref(size), None, 0)
    except (OSError, AttributeError):
        return ""
    return "" if failed else found.value.decode("ascii")


def _state_and_start(pid: int) -> tuple[str, str]:
    """Return the state of a process, as one letter, and its start by the kernel's clock; ("", "") if it is not seen."""
    if sys.platform == "darwin":  # it keeps the time of the start as it was
        try:
            process = psutil.Process(pid)
            return "Z" if process.status() == psutil.STATUS_ZOMBIE else "R", f"{process.create_time():.6f}"
        except psutil.Error:
            return "", ""
    try:
        fields = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    after_name = fields.rpartition(")")[2].split()
    return after_name[0], after_name[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _matches(pid: int, created_at: float) -> bool:
    try:
        process = psutil.Process(pid)
        return bool(abs(process.create_time() - created_at) < 1 and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, ValueError, OverflowError):
        return False
