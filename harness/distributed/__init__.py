"""Processes, devices, precision, and who shards what."""
