"""What the page of the recipes says of each: the loss and the score before and after some steps on its stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.recipes.stand_ins import STAND_INS, run_recipe

# What makes so small a model learn so few rows in seconds.
QUICK: dict[str, Any] = {
    "max_steps": 160,
    "learning_rate": 3e-3,
    "warmup_steps": 0,
    "per_device_train_batch_size": 16,
    "logging_steps": 80,
    "eval_strategy": "steps",
    "eval_steps": 80,
    "save_strategy": "steps",
    "save_steps": 80,
    "eval_on_start": True,
}
# The texts are shorter than a block of the recipe; random crops of images of 16 pixels show little.
OF_ONE = {"gpt2_short_texts": {"block_size": 16}, "beans_vit": {"without_augmentation": True}}
SHOWN = ("accuracy", "f1", "matthews_correlation")


def evaluations(name: str, folder: Path) -> tuple[int, list[dict[str, float]]]:
    """The steps that were made, and the evaluations from the first, before any step, to the last."""
    state = run_recipe(name, folder, **{**QUICK, **OF_ONE.get(name, {})})
    return state["global_step"], [row for row in state["log_history"] if "eval_loss" in row]


def figures(name: str, folder: Path) -> str:
    """The cells of the recipe's row: steps, loss, and the score that decides, or else the first."""
    steps, rows = evaluations(name, folder)
    scores = [f"eval_{score}" for score in SHOWN if f"eval_{score}" in rows[0]]
    metric = STAND_INS[name][2]
    chosen = ["eval_loss", *([metric] if metric in scores else scores[:1])]
    cells = [f"{each} {rows[0][each]:.2f} to {rows[-1][each]:.2f}" for each in chosen]
    return " | ".join([str(steps), *cells])
