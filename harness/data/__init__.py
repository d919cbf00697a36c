"""Samples to batches, their order, and the place in them."""
