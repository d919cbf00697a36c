"""Go on after an out-of-memory in mid-run: the step is made again, with its micro-batches split by samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

from harness.data.loader import Batch
from harness.distributed.backend import Stepper
from harness.errors import LESS_MEMORY, MemoryShortError, is_memory_short
from harness.fitting.memory import release
from harness.fitting.reduction import LateReduction
from harness.training import rng
from harness.training.console import Console
from harness.training.loss import Loss, Share
from harness.training.metrics import Window
from harness.training.weighing import BATCHES, Repeated, rows, take

Part = tuple[Batch, Share]


class Splitting:
    """
    Makes a step again that is out of memory, from its beginning, with micro-batches that are split.

    What the step has added to gradients, window and random generators is undone. Parts stay so small for the rest of
    the training, resumes included: `most_rows` samples, None for whole micro-batches. With several ranks, all of them
    make the step again, in the same parts. Without `is_on` an error is raised as it is.
    """

    def __init__(
        self, loss: Loss, window: Window, stepper: Stepper, console: Console, *, batch_size: int, is_on: bool
    ) -> None:
        self.loss, self.window, self.stepper, self.console = loss, window, stepper, console
        self.batch_size, self.is_on = batch_size, is_on
        self.most_rows: int | None = None
        self.reduction: LateReduction | None = None  # of several ranks

    def attempts(
        self, window: Sequence[Batch], shares: Sequence[Share], *, step: int
    ) -> Iterator[AbstractContextManager[Sequence[Part]]]:
        """
        Yield a context for each attempt at a step's micro-batches; it returns them with their shares.

        One that runs out of memory is followed by another. Collective with several ranks, where the end of an attempt
        reduces the gradients. Raises MemoryShortError where another rank is out of memory and nothing can be split.
        """
        if not self.is_on:
            yield nullcontext([*zip(window, shares, strict=True)])
            return
        device = self.loss.accelerator.device
        generators = {**rng.capture_host(), "own": rng.capture_own(device)}
        while True:
            attempt = Attempt(self, self.parts(window, shares))
            yield attempt
            if attempt.is_done:
                return
            self.stepper.zero_grad()
            self.window.restart_step()
            release()  # the error and what it held are gone
            rng.restore(generators, device)
            self.most_rows = -(-self.size // 2)
            self.console.line(
                f"Out of memory in step {step}: micro-batches are split into parts of at most {self.most_rows} "
                f"sample{'s' if self.most_rows > 1 else ''} from here on, and the step is made again."
            )

    @property
    def size(self) -> int:
        """The most samples that go through the model at once."""
        return self.batch_size if self.most_rows is None else min(self.batch_size, self.most_rows)

    @property
    def can_split(self) -> bool:
        """Whether smaller parts are possible, and give the same loss."""
        return self.size > 1 and (self.loss.weighing is None or self.loss.weighing.by != BATCHES)

    def parts(self, window: Sequence[Batch], shares: Sequence[Share]) -> list[Part]:
        """Return the micro-batches of a step, split as far as `most_rows` says, each with its share in the step."""
        found: list[Part] = []
        for batch, share in zip(window, shares, strict=True):
            count = rows(batch)
            if count <= self.size:
                found.append((batch, share))
                continue
            kind = type(batch) if isinstance(batch, Repeated) else dict
            split = [kind(take(batch, each)) for each in evenly(count, most=self.size)]
            found += zip(split, self.loss.divide(share, batch, split), strict=True)
        return found

    def is_made_again(self, error: BaseException | None) -> bool:
        """
        Collective, unless an error of another kind has ended the attempt: whether the step is to be made again.

        If not, and there is no error, gradients are reduced. Raises MemoryShortError where only another rank has one.
        """
        failed = error is not None and is_memory_short(error)
        if error is not None and not failed:
            return False
        if not (failed if self.reduction is None else self.reduction.any_failed(failed)):
            if self.reduction is not None:
                self.reduction.reduce()
            return False
        if error is None and not self.can_split:
            raise MemoryShortError(f"Out of memory on another rank: {LESS_MEMORY}.")
        return self.can_split

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume begins with: plain values, {} while nothing was split."""
        return {} if self.most_rows is None else {"batch_size": self.batch_size, "most_rows": self.most_rows}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; micro-batches of another size are tried whole first."""
        self.most_rows = saved["most_rows"] if saved.get("batch_size") == self.batch_size else None


class Attempt(AbstractContextManager[Sequence[Part]]):
    """One attempt at a step's micro-batches: an out-of-memory does not leave the block, and `is_done` stays False."""

    def __init__(self, splitting: Splitting, parts: Sequence[Part]) -> None:
        self._splitting, self._parts = splitting, parts
        self.is_done = False

    def __enter__(self) -> Sequence[Part]:
        return self._parts

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.is_done = not self._splitting.is_made_again(error)
        return not self.is_done  # else an error is raised


def evenly(count: int, *, most: int) -> list[range]:
    """Return the numbers below `count` in as few ranges as possible, of at most `most` each and of about one size."""
    parts = -(-count // most)
    bounds = [count * i // parts for i in range(parts + 1)]
    return [range(start, end) for start, end in pairwise(bounds)]
