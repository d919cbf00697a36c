"""A part of a save that is tried before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from harness.errors import ConfigError

MOST_LETTERS = 600  # of another library's message


@dataclass(frozen=True)
class Trial:
    """What is tried, in words, and the function that writes it into a folder."""

    what: str
    act: Callable[[Path], object]

    def make(self, folder: Path) -> None:
        """Do it. Raises ConfigError for whatever it raises: that is what every save would end with."""
        try:
            self.act(folder)
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".")[:MOST_LETTERS]
            kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__} "
            raise ConfigError(f"{self.what} can't be saved, so no step is made: {kind}{reason}.") from error


def pickle(states: Mapping[str, Any]) -> None:
    """Try to write states with torch, into memory."""
    for state in states.values():
        torch.save(state, BytesIO())
