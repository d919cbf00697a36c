"""Damage a file of a checkpoint, by a generator of random numbers; and tell whether only values of it are others."""

from __future__ import annotations

import copy
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.checkpoint.arrays import IN_PLACE_OF_NUMPY, with_arrays
from harness.files import load_safely

# What a resume reads. A model's config and its tokenizer it does not.
READ = (
    "harness_state.json",
    "trainer_state.json",
    "model*.safetensors",
    "adapter_model.safetensors",
    "model.safetensors.index.json",
    "optimizer*.pt",
    "scheduler.pt",
    "rng_state*.pth",
    "metrics.jsonl",
)
# Each takes the place of something in JSON, or in torch's files.
OTHERS: tuple[Any, ...] = (-7, 0, 3, 10**6, 2**70, -1.5, 1e308, float("nan"), float("inf"), True, None, "x", "", "\0")
NESTED: tuple[Any, ...] = ([], [1], {}, {"x": 1}, [[]], "../../x", "/etc/passwd")
DEEP = 3000


def files_of(checkpoint: Path) -> list[Path]:
    """Return the files that a resume reads, in order."""
    return sorted({file for pattern in READ for file in checkpoint.glob(pattern)})


def damaged(checkpoint: Path, chance: random.Random, *, fits: bool) -> str:
    """Damage a file, and return what was done to it. With `fits` rather what is inside than its bytes."""
    file = chance.choice(files_of(checkpoint))
    inside = STRUCTURES.get(file.suffix)
    ways: list[tuple[str, Callable[[Path, random.Random], str]]] = [*BYTES.items()]
    if inside is not None and chance.random() < (0.75 if fits else 0.4):
        ways = [("inside", inside)]
    name, act = chance.choice(ways)
    return f"{file.name}: {name} {act(file, chance)}"


# Bytes


def _flip(file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    places = [chance.randrange(len(content)) for _ in range(chance.choice((1, 1, 1, 2, 8, 64)))]
    for place in places:
        content[place] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return f"a bit each at {places[:4]}"


def _overwrite(file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    start = chance.randrange(len(content))
    length = min(chance.choice((1, 4, 100, 4096)), len(content) - start)
    content[start : start + length] = bytes(length) if chance.random() < 0.5 else chance.randbytes(length)
    file.write_bytes(content)
    return f"{length} bytes at {start}"


def _cut(file: Path, chance: random.Random) -> str:
    length = chance.choice((0, 1, 8, chance.randrange(file.stat().st_size), file.stat().st_size - 1))
    file.write_bytes(file.read_bytes()[:length])
    return f"to {length} bytes"


def _lengthen(file: Path, chance: random.Random) -> str:
    more = chance.randbytes(chance.choice((1, 100, 5000)))
    file.write_bytes(file.read_bytes() + more)
    return f"by {len(more)} bytes"


def _remove(file: Path, chance: random.Random) -> str:
    file.unlink()
    if chance.random() < 0.3:
        file.mkdir()
        return "and a folder in its place"
    return ""


def _swap(file: Path, chance: random.Random) -> str:
    other = chance.choice(files_of(file.parent))
    file.write_bytes(other.read_bytes())
    return f"by {other.name}"


BYTES: dict[str, Callable[[Path, random.Random], str]] = {
    "flipped": _flip,
    "overwritten": _overwrite,
    "cut": _cut,
    "longer": _lengthen,
    "removed": _remove,
    "replaced": _swap,
}


# What is inside


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all places in a tree of mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for i, (key, each) in enumerate(items):
        if i > 40 and not isinstance(value, dict):
            return
        yield (*path, key)
        yield from _places(each, (*path, key))


def _changed(tree: Any, chance: random.Random, other: Callable[[Any], Any]) -> tuple[Any, str]:
    """Return the tree with something else at one of its places, and what was done."""
    places = sorted(_places(tree), key=str)
    if not places or chance.random() < 0.03:
        found = other(tree)
        return found, f"all of it by {_shown(found)}"
    # Of the levels alike: else most would be in the longest list.
    depth = chance.choice(sorted({len(place) for place in places}))
    path = chance.choice([place for place in places if len(place) == depth])
    return _with(tree, path, chance, other)


def _with(tree: Any, path: tuple[Any, ...], chance: random.Random, other: Callable[[Any], Any]) -> tuple[Any, str]:
    key, *rest = path
    where = type(tree)
    items = dict(tree) if isinstance(tree, dict) else list(tree)
    if rest:
        items[key], told = _with(items[key], tuple(rest), chance, other)
        return where(items) if where in (dict, list, tuple) else items, f"{key}.{told}"
    way = chance.random()
    if way < 0.2:
        del items[key]
        told = f"{key} removed"
    elif way < 0.3 and isinstance(items, dict):
        items[chance.choice(("x", 99, "step", "optimizer"))] = other(items[key])
        told = f"something beside {key}"
    elif way < 0.3:
        items.append(copy.copy(items[key]))
        told = f"{key} twice"
    else:
        items[key] = other(items[key])
        told = f"{key} by {_shown(items[key])}"
    return tuple(items) if where is tuple else items, told


def _shown(value: Any) -> str:
    return f"a tensor of {list(value.shape)}, {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)[:60]


def _in_json(file: Path, chance: random.Random) -> str:
    tree = json.loads(file.read_text(encoding="utf-8"))
    if chance.random() < 0.03:
        file.write_text("[" * DEEP * 100 + "]" * DEEP * 100, encoding="utf-8")
        return "a deep list"
    tree, told = _changed(tree, chance, lambda value: _another(value, chance))
    file.write_text(json.dumps(tree, indent=2), encoding="utf-8", errors="surrogatepass")
    return told


def _in_lines(file: Path, chance: random.Random) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    i = chance.randrange(len(lines))
    tree, told = _changed(json.loads(lines[i]), chance, lambda value: _another(value, chance))
    lines[i] = json.dumps(tree)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"line {i}: {told}"


def _another(value: Any, chance: random.Random) -> Any:
    return chance.choice([each for each in (*OTHERS, *NESTED) if type(each) is not type(value) or each != value])


def _in_torch(file: Path, chance: random.Random) -> str:
    tree = torch.load(file, weights_only=False)  # our own, whole
    tree, told = _changed(tree, chance, lambda value: _another_object(value, chance))
    torch.save(tree, file)
    return told


def _another_object(value: Any, chance: random.Random) -> Any:
    if isinstance(value, torch.Tensor) and chance.random() < 0.7:
        return _another_tensor(value, chance)
    if isinstance(value, np.ndarray) and chance.random() < 0.7:
        return chance.choice((value[:3], value.astype(np.float64), value.astype(np.int64), np.zeros((2, 2)), Crafted()))
    return _another(value, chance) if chance.random() < 0.8 else torch.zeros(chance.choice(((), (3,), (2, 5))))


def _another_tensor(value: torch.Tensor, chance: random.Random) -> torch.Tensor:
    ways: list[Callable[[], torch.Tensor]] = [
        lambda: value.reshape(-1)[:3].clone(),
        lambda: value.reshape(-1)[:0].clone(),
        lambda: torch.zeros((*value.shape, 2), dtype=value.dtype),
        lambda: value.reshape(-1).clone(),
        lambda: torch.zeros((), dtype=value.dtype).expand(value.shape),
        lambda: value.reshape(-1)[:1].clone().expand(10**9),
        lambda: value.to(torch.int64),
        lambda: value.to(torch.complex64),
        lambda: value.to(torch.bool),
        lambda: value.to_sparse() if value.dim() else value.double(),
        lambda: torch.full_like(value.float(), float("nan")),
        lambda: torch.empty_like(value, device="meta"),
        lambda: torch.nn.Parameter(value.float()),
        lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
    ]
    return chance.choice(ways)()


class Crafted:
    """An array of numpy's whose type claims to hold objects."""

    def __reduce__(self) -> Any:
        return np.array([1]).__reduce__()[0], np.array([1]).__reduce__()[1], (1, (4,), _Type(), False, bytes(range(32)))


class _Type:
    def __reduce__(self) -> Any:
        return np.dtype, ("u8", False, True), (3, "<", None, None, None, -1, -1, 63)


def _in_safetensors(file: Path, chance: random.Random) -> str:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    tree, told = _changed(json.loads(content[8 : 8 + length]), chance, lambda value: _another_entry(value, chance))
    header = json.dumps(tree).encode()
    header += b" " * (-len(header) % 8)
    said = len(header) if chance.random() < 0.9 else chance.choice((0, 2**40, 2**63, len(header) + 8))
    file.write_bytes(struct.pack("<Q", said) + header + content[8 + length :])
    return told if said == len(header) else f"a header of {said} bytes"


def _another_entry(value: Any, chance: random.Random) -> Any:
    if isinstance(value, str):
        return chance.choice(("F64", "F16", "BF16", "I32", "U8", "X", 3, None))
    if isinstance(value, int):
        return chance.choice((value + 1, value - 1, 0, -1, 2**40, 2**63, "x"))
    return _another(value, chance)


STRUCTURES: dict[str, Callable[[Path, random.Random], str]] = {
    ".json": _in_json,
    ".jsonl": _in_lines,
    ".pt": _in_torch,
    ".pth": _in_torch,
    ".safetensors": _in_safetensors,
}


# What may be another value, and nothing else


def same_structure(whole: Path, other: Path, *, torn: bool) -> bool:
    """
    Whether the files of two checkpoints have the same names, types, shapes and dtypes, and differ in values alone.

    Files that are `torn` keep their checksums: what these can tell has to be told, so it is no value. A parameter
    without a state, or with an empty one, is one that has had no gradient.
    """
    for name in {file.name for folder in (whole, other) for file in files_of(folder)}:
        a, b = _structure(whole / name, torn=False), _structure(other / name, torn=torn)
        if name.startswith("optimizer") and isinstance(b, dict) and isinstance(b.get("state"), dict):
            b = {**b, "state": {index: values for index, values in b["state"].items() if values != {}}}
            a = {**a, "state": {index: a["state"].get(index) for index in b["state"]}}
        if a != b:
            return False
    return True


def _structure(file: Path, *, torn: bool) -> Any:
    try:
        if file.suffix == ".json":
            return _shape(json.loads(file.read_text(encoding="utf-8")))
        if file.suffix == ".jsonl":
            return [_shape(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        if file.suffix == ".safetensors":
            content = file.read_bytes()
            return content[8 : 8 + struct.unpack("<Q", content[:8])[0]], len(content)
        if torn and zipfile.ZipFile(file).testzip() is not None:
            return "torn"
        return _shape(with_arrays(load_safely(file, "cpu", IN_PLACE_OF_NUMPY, mmap="optimizer" in file.name)))
    except Exception as error:
        return f"{type(error).__name__} {error}"


def _shape(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    if isinstance(value, dict):
        return {key: _shape(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value).__name__, [_shape(each) for each in value]
    if isinstance(value, torch.Tensor | np.ndarray):
        return type(value).__name__, str(value.dtype), tuple(value.shape)
    return type(value).__name__
