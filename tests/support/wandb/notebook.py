"""Cells of a notebook, run in a kernel of their own as Jupyter runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

KERNEL = """
import json, sys
from jupyter_client.manager import start_new_kernel

shown = []

def take(message):
    content = message["content"]
    if message["msg_type"] == "stream":
        shown[-1] += content["text"]
    elif message["msg_type"] == "execute_result":
        shown[-1] += content["data"]["text/plain"]

manager, client = start_new_kernel(kernel_name="python3")
try:
    for cell in json.load(sys.stdin):
        shown.append("")
        reply = client.execute_interactive(cell, timeout=180, output_hook=take)
        assert reply["content"]["status"] == "ok", "\\n".join([shown[-1], *reply["content"]["traceback"]])
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
print(json.dumps(shown))
"""


def cells_of(notebook: Path) -> list[str]:
    """The code of a notebook, cell by cell."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def run_cells(cells: Sequence[str], env: Mapping[str, str], *, folder: Path) -> list[str]:
    """Run the cells, one after the other, in the folder; returns what each has shown."""
    done = subprocess.run(
        [sys.executable, "-c", KERNEL],
        input=json.dumps(list(cells)),
        env=dict(env),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    shown: list[str] = json.loads(done.stdout.splitlines()[-1])
    return shown
