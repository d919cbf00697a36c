"""A server on this machine that speaks W&B's protocol to the real client; its state outlives it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from .records import ArtifactRecord, LinkRecord, RunRecord, read_artifacts, read_links, read_requests, read_runs

API_KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY = "tester"
ROOT = Path(__file__).parents[3]
START_SECONDS = 30.0


class WandbServer:
    """A server process over the state in `folder`. A context manager: starts it, ends it.

    A run that it hears nothing of for `silence_seconds` has crashed.
    """

    def __init__(self, folder: Path | str, silence_seconds: float = 300.0) -> None:
        self.folder = Path(folder)
        self._silence_seconds = silence_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def __enter__(self) -> WandbServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, the second time on the same port."""
        assert self._process is None
        self.folder.mkdir(parents=True, exist_ok=True)
        said = self.folder / "port"
        said.unlink(missing_ok=True)
        options = {"dir": self.folder.resolve(), "port": self._port, "silence_seconds": self._silence_seconds}
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "tests.support.wandb_server", *flags, "--end_with_stdin"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
        end = time.monotonic() + START_SECONDS
        while not said.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError("the W&B server did not start")
            time.sleep(0.02)
        self._port = int(said.read_text(encoding="utf-8"))

    def stop(self) -> None:
        """SIGTERM: it answers what it has begun, for a second."""
        self._end(kill=False)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(kill=True)

    def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill() if kill else process.terminate()
        assert process.stdin
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            process.stdin.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self) -> dict[str, str]:
        """What makes wandb's client use this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY}

    # What it holds; the server need not run.

    def runs(self) -> list[RunRecord]:
        return read_runs(self.folder, self._silence_seconds)

    def run(self, run_id: str) -> RunRecord:
        (found,) = [run for run in self.runs() if run.id == run_id]
        return found

    def artifacts(self, collection: str | None = None) -> list[ArtifactRecord]:
        return [each for each in read_artifacts(self.folder) if collection in (None, each.collection)]

    def links(self) -> list[LinkRecord]:
        return read_links(self.folder)

    def requests(self) -> list[dict[str, Any]]:
        """Each with time, seconds, method, path, label, status; `fault` where one struck."""
        return read_requests(self.folder)

    def unknown(self) -> list[dict[str, Any]]:
        """The requests that the server doesn't know or failed at."""
        return [each for each in self.requests() if "unknown" in each]

    # What goes wrong: see `faults.Fault`.

    def fault(self, kind: str, match: str = "", **options: float | str) -> None:
        """`fault("status", "file_stream", code=500, seconds=3)`, `fault("drop", "put artifact/", count=1)` ..."""
        self._control("POST", "faults", {"kind": kind, "match": match, **options})

    def clear_faults(self) -> None:
        self._control("DELETE", "faults", {})

    def request_stop(self, run_id: str, project: str, entity: str = ENTITY) -> None:
        """The app's "Stop run"."""
        self._control("POST", "stop", {"run": run_id, "project": project, "entity": entity})

    def _control(self, method: str, what: str, body: dict[str, Any]) -> None:
        request = urllib.request.Request(  # noqa: S310 - ourselves
            f"{self.url}/_control/{what}", json.dumps(body).encode(), method=method
        )
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310
