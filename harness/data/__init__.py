"""Samples, batches, their order, and the position in them."""
