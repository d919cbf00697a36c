"""What became of the artifacts of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

NAMES_IN_A_LINE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pending:
    """An artifact that W&B doesn't have, or has not linked, and why."""

    name: str
    aliases: list[str]
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delivery:
    """
    What became of the artifacts: committed (`name:v0`), still pending, staged for `wandb sync` by an offline run.

    `command` delivers what is left; None if nothing is, or if no command can.
    """

    committed: list[str] = dataclasses.field(default_factory=list)
    pending: list[Pending] = dataclasses.field(default_factory=list)
    staged: list[str] = dataclasses.field(default_factory=list)
    command: str | None = None

    def describe(self) -> str:
        """All of it in a line."""
        parts = []
        if self.committed or not (self.pending or self.staged):
            named = f": {_listed(self.committed)}" if self.committed else ""
            parts.append(f"{_count(self.committed)} confirmed by the server{named}")
        if self.staged:
            parts.append(f"{_count(self.staged)} staged: {_listed(self.staged)}")
        if self.pending:
            reasons = [f"{pending.name} ({pending.aliases[-1]}): {pending.reason}" for pending in self.pending]
            parts.append(f"{_count(self.pending)} not delivered: {_listed(reasons)}")
        if self.command is not None:
            parts.append(f"deliver: {self.command}")
        return "; ".join(parts)


def _count(what: list[Any]) -> str:
    return f"{len(what)} artifact{'' if len(what) == 1 else 's'}"


def _listed(names: list[str]) -> str:
    more = [f"{len(names) - NAMES_IN_A_LINE} more"] if len(names) > NAMES_IN_A_LINE else []
    return ", ".join([*names[:NAMES_IN_A_LINE], *more])
