"""Scores computed batch by batch."""
