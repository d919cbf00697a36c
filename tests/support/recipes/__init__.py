"""The recipes on small stand-ins: `python -m tests.support.recipes` prints the figures of their page."""
