"""
`-m tests.support.measuring.late_gathers FLAG...`, under a launcher: train where a gather ends as late as it may.

An asynchronous all-gather writes nothing before it is waited for, and leaves NaN where nobody waits. With gloo it may
be so by chance: its threads work on several gathers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from harness.train import main


class Late:
    """The handle of an all-gather that has not begun."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self.begin: Callable[[], Any] | None = begin

    def wait(self, *_: Any) -> None:
        begin, self.begin = self.begin, None
        if begin is not None:
            begin()


def let_end_late() -> None:
    """Change torch's function, before DeepSpeed takes it."""
    gather = torch.distributed.all_gather_into_tensor

    def late(
        output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Late | None:
        if not async_op:
            gather(output_tensor, input_tensor, group)
            return None
        part = input_tensor.clone()  # it may lie in the output
        output_tensor.fill_(float("nan"))
        return Late(lambda: gather(output_tensor, part, group))

    torch.distributed.all_gather_into_tensor = late


if __name__ == "__main__":
    let_end_late()
    sys.exit(main(sys.argv[1:]))
