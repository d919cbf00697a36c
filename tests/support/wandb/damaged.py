"""What becomes of a file on a bad disk, or in bad hands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path


def _nested(content: bytes) -> bytes:
    return b'{"run_id": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n" + content


def _typed(content: bytes) -> bytes:
    """Each value of the file's JSON, or of its lines', as another type."""
    texts = [content] if content.lstrip().startswith(b"{\n") else content.splitlines()
    changed = [{name: [value] for name, value in json.loads(text).items()} for text in texts]
    return b"".join(json.dumps(each).encode() + b"\n" for each in changed)


def _nulls(content: bytes) -> bytes:
    texts = [content] if content.lstrip().startswith(b"{\n") else content.splitlines()
    return b"".join(json.dumps(dict.fromkeys(json.loads(text))).encode() + b"\n" for text in texts)


JSON: dict[str, Callable[[bytes], bytes]] = {
    "NULs": lambda content: b'\0\0\0"_type"\0\0\n' + content[1:],
    "cut": lambda content: content[: len(content) // 2],
    "types": _typed,
    "null": _nulls,
    "a list": lambda _: b"[1, 2]\n",
    "bytes": lambda content: b"\xff\xfe\x80\x81\n" + content[1:],
    "nested": _nested,
    "numbers": lambda content: (
        b'{"run_id": ' + b"9" * 10_000 + b', "_row": 1e999, "_step": -1, "_type": NaN}\n' + content[1:]
    ),
    "empty": lambda _: b"",
}
PLACES = ("folder", "loop")  # a folder in its place; a link to itself, which nobody can open


def damage(path: Path, kind: str) -> None:
    """Do it to a file; what is there is replaced."""
    content = path.read_bytes() if path.is_file() else b""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.write_bytes(JSON[kind](content))
