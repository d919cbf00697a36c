"""Checkpoints on disk: found, written, whole or absent."""
