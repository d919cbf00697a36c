"""Checkpoints on disk: find them, read them, and write them whole or not at all."""
