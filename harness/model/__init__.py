"""Weights, adapters, optimizers."""
