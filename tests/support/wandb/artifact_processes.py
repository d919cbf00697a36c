"""Processes that use W&B in a folder of their own: no credentials but the test server's, no home, no settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.wandb_server import WandbServer

ROOT = Path(__file__).parents[3]


def environment(folder: Path, server: WandbServer | None = None, **variables: str) -> dict[str, str]:
    """No credentials, no wandb settings, no home but `folder`'s; those of the server if there is one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
    places = {f"WANDB_{kind}_DIR": str(folder / "wandb-dirs" / kind) for kind in ("CONFIG", "CACHE", "DATA")}
    home = {"HOME": str(folder / "home"), "NETRC": str(folder / "netrc"), "PYTHONPATH": str(ROOT)}
    return {**kept, **places, **home, **(server.environment() if server else {}), **variables}


def start(*argv: str, folder: Path, server: WandbServer | None = None) -> subprocess.Popen[str]:
    """Start python with `argv` in the folder."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *argv],
        env=environment(folder, server),
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], *, code: int = 0, timeout: float = 150) -> str:
    """What the process wrote to standard output; it must end with `code`."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"it did not end within {timeout} s:\n{out}\n{err}") from None
    assert process.returncode == code, f"{out}\n{err}"
    return out


def command(line: str, folder: Path, server: WandbServer | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command that we told the user to run."""
    line = re.sub(r"\b(harness|wandb) (sync|link)\b", rf"{sys.executable} -m \1 \2", line)
    return subprocess.run(  # noqa: S602 - as the user would type it
        line,
        shell=True,
        env=environment(folder, server),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
