"""
Read numpy's arrays out of torch's files without numpy's own unpickling.

The generators' state holds an array, in the Trainer's files too. Numpy believes what a file says of a type's flags: one
that claims to hold objects makes it follow numbers as addresses. Here a file only fills in records of plain values,
and an array is made from those that an array of numbers has.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import ConfigError

NUMBERS = re.compile(r"b1|[iu][1248]|f[248]")  # numpy's codes of the types that hold plain numbers
UNDER_WAY = object()


class SavedType:
    """The description of a type in a file, in place of numpy.dtype."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments: Any = arguments
        self.state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class SavedArray:
    """An array in a file, in place of numpy.ndarray."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _begun(*_: Any) -> SavedArray:
    return SavedArray()


# What torch is to call for the names in a file; those of numpy 1 differ from those of numpy 2.
IN_PLACE_OF_NUMPY = (
    (_begun, "numpy.core.multiarray._reconstruct"),
    (_begun, "numpy._core.multiarray._reconstruct"),
    (SavedArray, "numpy.ndarray"),
    (SavedType, "numpy.dtype"),
)


def with_arrays(content: Any) -> Any:
    """
    Return what torch has read, with arrays in place of their records.

    Raises ConfigError for an array of anything but numbers, and for a container that holds itself.
    """
    return _replaced(content, {})


def _replaced(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, SavedArray):
        return _array(value.state)
    if isinstance(value, SavedType):
        raise ConfigError("it holds a type of numpy's, and only arrays of numbers are read")
    if not isinstance(value, dict | list | tuple) or not value:
        return value
    if id(value) not in done:  # each once, however often it is referred to
        done[id(value)] = UNDER_WAY
        done[id(value)] = _container(value, done)
    if done[id(value)] is UNDER_WAY:
        raise ConfigError("it holds a container that holds itself")
    return done[id(value)]


def _container(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, dict):
        for name, each in value.items():
            value[name] = _replaced(each, done)
        return value
    items = [_replaced(each, done) for each in value]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value  # of its own class, a torch.Size say
    return items if isinstance(value, list) else tuple(items)


def _array(state: Any) -> npt.NDArray[Any]:
    """Return the array of what numpy has saved of one: version, shape, type, order, bytes. Raises ConfigError."""
    try:
        _, shape, kind, is_fortran, data = state
        code, order = kind.arguments[0], kind.state[1] if kind.state else "|"
        # Of a type of plain numbers: no subarray, names or fields, no size of its own, no flags.
        is_plain = NUMBERS.fullmatch(code) is not None and order in ("<", ">", "|", "=")
        is_plain = is_plain and tuple(kind.state[2:]) in ((), (None, None, None, -1, -1, 0))
        sizes = [int(size) for size in shape]
        dtype = np.dtype(code).newbyteorder(order) if is_plain else None
        if dtype is None or min(sizes, default=0) < 0 or len(data) != math.prod(sizes) * dtype.itemsize:
            raise ValueError
        array = np.frombuffer(data, dtype).reshape(sizes, order="F" if is_fortran else "C")
        return array.astype(dtype.newbyteorder("="))
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ConfigError("it holds an array of numpy's that is no plain array of numbers") from error
