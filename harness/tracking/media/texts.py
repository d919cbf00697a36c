"""Texts that the model writes while it is trained: lines for a person, and a table for W&B."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from harness.tasks import Complete, Draw
from harness.tracking.media.tables import undisturbed
from harness.tracking.tracker import WandbTracker
from harness.training import rng

logger = logging.getLogger(__name__)

COMPLETED, DRAWN = "generated_texts", "sampled_texts"
Pairs = Sequence[tuple[str, str]]


class Texts:
    """
    Rank zero, or all if the model is sharded: shows what it writes, by `say` and in W&B.

    - complete, prompts: what it writes for each of the prompts. Without prompts nothing is asked.
    - draw, seed: texts that are drawn at random, from the seed and the step: those of a step are the same however often
      the training has been resumed before it.
    """

    def __init__(
        self,
        complete: Complete | None,
        prompts: Sequence[str],
        draw: Draw | None,
        *,
        seed: int,
        device: torch.device,
        say: Callable[[str], None],
        tracker: WandbTracker,
    ) -> None:
        self._complete, self._prompts, self._draw = complete, list(prompts), draw
        self._seed, self._device = seed, device
        self._say, self._tracker = say, tracker
        self._have_failed: set[str] = set()

    def show(self, model: torch.nn.Module, *, step: int, completes: bool, draws: bool) -> None:
        """Write and show the texts that are due; `model` is the unwrapped one. In W&B each kind is a row of its own."""
        complete, draw = self._complete, self._draw
        if completes and complete is not None and self._prompts:
            self._write(
                COMPLETED, model, step, lambda: list(zip(self._prompts, complete(model, self._prompts), strict=True))
            )
        if draws and draw is not None:
            self._write(DRAWN, model, step, lambda: draw(model))

    def _write(self, name: str, model: torch.nn.Module, step: int, write: Callable[[], Pairs]) -> None:
        texts = self._written(name, model, step, write)
        for prompt, text in texts:
            self._say(f"step {step}  {prompt!r} -> {text!r}")
        if texts and self._tracker.config.uses_wandb:
            import wandb

            rows = [[step, prompt, text] for prompt, text in texts]
            table = wandb.Table(columns=["step", "prompt", "text"], data=rows)
            self._tracker.log_media({name: table}, step=step)

    def _written(self, name: str, model: torch.nn.Module, step: int, write: Callable[[], Pairs]) -> Pairs:
        """
        Return prompts with their texts, random generators and the model's modes as they were.

        What the task's function raises is a warning, once, and nothing is returned.
        """
        with (
            undisturbed(model, self._device),
            rng.seeded(self._seed, step, device=self._device),
            torch.no_grad(),
        ):
            model.eval()
            try:
                return [(prompt, text) for prompt, text in write()]
            except Exception as error:  # the user's code: anything; no training ends for the sake of a text
                if name not in self._have_failed:
                    function = "complete" if name == COMPLETED else "draw"
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    logger.warning("The task's %s failed, no text is shown, the training goes on: %s", function, reason)
                    logger.debug("It was raised here:", exc_info=error)
                self._have_failed.add(name)
        return []
