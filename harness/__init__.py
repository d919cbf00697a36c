"""
A training harness on Hugging Face Accelerate with the Trainer's flags, numbers and checkpoints.

`harness.run([...])` is the command `harness train` as a function: it takes flags, and a model and data sets of one's
own as arguments; it raises what goes wrong and returns metrics, model and folder.
`harness.latest_checkpoint(output_dir)` returns the newest checkpoint that a training can resume from. Both import the
libraries they need only when they are called.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "latest_checkpoint", "run"]

_WHERE = {"run": ("harness.train", "run"), "latest_checkpoint": ("harness.checkpoint.find", "latest_checkpoint")}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = _WHERE[name]
    return getattr(import_module(module), function)
