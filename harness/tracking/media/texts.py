"""Texts that the model writes while it is trained, for fixed prompts: lines for a person, and a table for W&B."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from harness.tasks import Complete
from harness.tracking.media.tables import undisturbed
from harness.tracking.tracker import WandbTracker

logger = logging.getLogger(__name__)

TABLE = "generated_texts"


class Texts:
    """Rank zero, or all if the model is sharded: shows what it writes for each of the prompts, by `say` and in W&B."""

    def __init__(
        self,
        complete: Complete,
        prompts: Sequence[str],
        *,
        device: torch.device,
        say: Callable[[str], None],
        tracker: WandbTracker,
    ) -> None:
        self._complete, self._prompts, self._device = complete, list(prompts), device
        self._say, self._tracker = say, tracker
        self._has_warned = False

    def show(self, model: torch.nn.Module, *, step: int) -> None:
        """Write and show the texts; `model` is the unwrapped one. In W&B they are a row of their own."""
        texts = self._written(model)
        for prompt, text in texts:
            self._say(f"step {step}  {prompt!r} -> {text!r}")
        if texts and self._tracker.config.uses_wandb:
            import wandb

            rows = [[step, prompt, text] for prompt, text in texts]
            table = wandb.Table(columns=["step", "prompt", "text"], data=rows)
            self._tracker.log_media({TABLE: table}, step=step)

    def _written(self, model: torch.nn.Module) -> list[tuple[str, str]]:
        """
        Return prompts with their texts, random generators and the model's modes as they were.

        What the task's `complete` raises is a warning, once, and nothing is returned.
        """
        with undisturbed(model, self._device), torch.no_grad():
            model.eval()
            try:
                return list(zip(self._prompts, self._complete(model, self._prompts), strict=True))
            except Exception as error:  # the user's code: anything; no training ends for the sake of a text
                if not self._has_warned:
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    logger.warning("The task's complete failed, no text is shown, the training goes on: %s", reason)
                    logger.debug("It was raised here:", exc_info=error)
                self._has_warned = True
        return []
