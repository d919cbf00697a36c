"""
Python processes that begin with the libraries loaded, forked from one that has imported them.

To import torch and transformers takes 4 to 6 seconds of processor time, and most tests of processes do not ask for it.
Nothing of `harness` or `tests` is loaded beforehand. What is promised of a start itself (what is printed, imported, or
read from the launcher's command line) is tested with `subprocess`.

This file is also the script of the process that forks, and of the one that stands in for Python under a launcher.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

# Not wandb: its import makes a temporary folder, which the first process that ends would remove.
MODULES = ("accelerate.commands.launch", "datasets", "transformers.trainer")
USES_FORKS = sys.platform == "linux"  # only Linux can tell when a process that is no child has ended
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SERVERS: list[Path] = []
STARTING = threading.Lock()


class Forked:
    """
    A running `python ARGV...`, in a session of its own: of `subprocess.Popen` what tests use.

    Unlike that, it is killed when nobody has this object any more.
    """

    def __init__(
        self, server: Path, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, files: Sequence[int]
    ) -> None:
        self.args = [sys.executable, *argv]
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(server))
        request = json.dumps({"argv": [*argv], "env": dict(env), "cwd": str(cwd)}).encode()
        socket.send_fds(self._connection, [len(request).to_bytes(8, "big")], files)
        self._connection.sendall(request)
        self.pid = int.from_bytes(self._connection.recv(8), "big")
        assert self.pid, "the process that forks has ended"

    def __del__(self) -> None:
        self._connection.close()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            told = self._connection.recv(8)
            self.returncode = int.from_bytes(told, "big", signed=True) if told else -signal.SIGKILL
            self._connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    command: Sequence[str], *, env: Mapping[str, str], cwd: Path, out: IO[Any], err: IO[Any]
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, with nothing to read."""
    return subprocess.Popen(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
    )


def fork(
    argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, out: IO[Any], err: IO[Any]
) -> Forked | subprocess.Popen[bytes]:
    """
    The same of `python ARGV...`, with the libraries loaded.

    Ranks that it starts by `torch.distributed.run` are forked too; they do not find their launcher's command line.
    """
    if not USES_FORKS:
        return start([sys.executable, *argv], env=env, cwd=cwd, out=out, err=err)
    with STARTING:
        if not SERVERS:
            SERVERS.append(_parents_server() or _start_server())
    (server,) = SERVERS
    env = {"PYTHON_EXEC": str(server.with_name("python")), **env}
    with Path(os.devnull).open() as nothing:
        return Forked(server, argv, env=env, cwd=cwd, files=[file.fileno() for file in (nothing, out, err)])


def forks_reach(device: str) -> bool:
    """Whether a forked process can compute on a device; where it can't, `fork` starts them as usual from here on."""
    global USES_FORKS
    code = f"import torch; torch.ones(1, device={device!r}).item()"
    with Path(os.devnull).open("w") as nothing:
        try:
            process = fork(["-c", code], env=os.environ, cwd=Path.cwd(), out=nothing, err=nothing)
            USES_FORKS = USES_FORKS and process.wait(60) == 0
        except (AssertionError, subprocess.TimeoutExpired):  # the libraries have begun threads; it waits for the device
            USES_FORKS = False
    return USES_FORKS


def _parents_server() -> Path | None:
    """The address of the one that this process was forked from, if it was."""
    address = Path(os.getenv("PYTHON_EXEC", sys.executable)).with_name("socket")
    return address if address.is_socket() else None


def _start_server() -> Path:
    """The address of one that ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="harness-fork-")
    address, python = Path(folder.name) / "socket", Path(folder.name) / "python"
    # Without site-packages it starts at once.
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" "{address}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    # transformers prints a line when it is imported with WANDB_MODE=offline.
    clean = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "PYTHONPATH")}
    clean["OMP_NUM_THREADS"] = "1"  # threads that begin with the import would be lost by a fork
    clean["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # CUDA can't be used after a fork by who has asked it anything before
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(address)],
        env=clean,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    atexit.register(_end_server, process, folder)
    return address


def _end_server(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
    folder.cleanup()


def serve(address: str) -> dict[str, Any]:
    """Fork until the standard input is closed. Returns in each new process, with what it was asked to run."""
    for name in MODULES:
        importlib.import_module(name)
    threads = [path.joinpath("comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, f"a thread is lost by a fork: {threads}"
    gc.collect()
    gc.freeze()  # what is loaded: else each process looks at all of it, and copies its memory, a last time when it ends
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return _attend(connection)
            connection.close()
            while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):  # those that attended to earlier ones
                pass
    os._exit(0)


def _attend(connection: socket.socket) -> dict[str, Any]:
    """Returns in the new process; who asked is told its number and its end; if he goes before, it is killed."""
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    text = connection.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL) if length else b""
    if len(text) < int.from_bytes(length, "big") or not text:  # who asked has been killed in the middle of it
        os._exit(0)
    request: dict[str, Any] = json.loads(text)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        connection.sendall(os.getpid().to_bytes(8, "big"))
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        return request
    for file in files:
        os.close(file)
    if connection in select.select([os.pidfd_open(pid), connection], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        connection.sendall(code.to_bytes(8, "big", signed=True))
    finally:
        os._exit(0)


def begin(argv: list[str], env: dict[str, str], cwd: str) -> None:
    """In a new process: what Python does before it comes to the script, and the script."""
    import numpy as np
    import torch

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests may ignore it
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    random.seed()
    np.random.seed()
    num_threads = int(env.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    if num_threads != torch.get_num_threads():
        torch.set_num_threads(num_threads)
    if argv[0] == "-u":
        sys.stdout.reconfigure(line_buffering=True)
        argv = argv[1:]
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind = argv[0] if argv[0] in ("-c", "-m") else "script"
    sys.argv = argv if kind in ("-c", "script") else argv[1:]
    sys.path[:0] = [str(Path(argv[0]).resolve().parent) if kind == "script" else "" if kind == "-c" else cwd, *paths]
    if kind == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
    elif kind == "-m":
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def stand_in(server: Path, argv: Sequence[str]) -> int:
    """As the process itself: signals are passed on, and the end is the same."""
    process = Forked(server, argv, env=os.environ, cwd=Path.cwd(), files=(0, 1, 2))
    for number in FORWARDED:
        signal.signal(number, lambda number, _: process.send_signal(number))
    code = process.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        del sys.path[0]  # the folder of this file, which has packages named like others
        begin(**serve(sys.argv[2]))
    else:
        sys.exit(stand_in(Path(sys.argv[1]), sys.argv[2:]))
