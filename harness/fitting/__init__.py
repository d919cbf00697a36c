"""Micro-batches that fit in memory: the largest is found at the start, and one that is too large later is split."""
