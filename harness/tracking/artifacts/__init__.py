"""Artifacts: staged, uploaded, found again."""
