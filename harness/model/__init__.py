"""Weights, adapters, optimizers and learning rate schedules."""
