"""Processes, devices, precision, and how model and optimizer are spread over the ranks."""
