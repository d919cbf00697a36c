"""A training harness on Hugging Face Accelerate with the Trainer's flags, numbers and checkpoints."""

__version__ = "0.1.0"
